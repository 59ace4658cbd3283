"""The generator: one transformer for class and text conditioning."""
