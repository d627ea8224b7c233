"""deepopt rules as optax transformations."""
