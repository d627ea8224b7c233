"""The contract of torch's optimizers as a matrix: every rule, every check, every way to step."""
