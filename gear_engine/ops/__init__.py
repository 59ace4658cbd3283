"""Numerical ops, one module each; importing this package fills the backend registry."""
