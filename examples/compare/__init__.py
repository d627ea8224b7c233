"""Comparison studies: which optimizer, on what, and how sure are we."""
