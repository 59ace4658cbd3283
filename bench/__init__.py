"""Benchmarks, one file per op and end-to-end ones; installed as gear_engine.bench."""
