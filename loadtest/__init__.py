"""Benchmarks of a whole mesh, and what they share."""
