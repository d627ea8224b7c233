"""Kernels on tensors: what is compiled, kept and launched."""
