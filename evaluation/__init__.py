"""Benchmarks by their published protocols."""
