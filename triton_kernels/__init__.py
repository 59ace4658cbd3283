"""Triton kernels, one file per op; installed as gear_engine.triton_kernels."""
