"""Measurements that print what they were made with."""
