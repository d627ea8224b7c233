"""Plain float64 NumPy transcriptions of the update rules, one module per rule, used as oracles."""
