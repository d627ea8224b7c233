"""From a rule's program to kernels: its stages, and their source in C and Triton."""
