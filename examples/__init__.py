"""Examples that use the library on real tasks."""
