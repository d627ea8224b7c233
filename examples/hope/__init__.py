"""A byte-level language model in the style of Hope, trained end to end."""
