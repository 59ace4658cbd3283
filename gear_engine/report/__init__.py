"""Latency reports: the canonical JSON record of a benchmark run, what is derived from it, and comparisons."""
