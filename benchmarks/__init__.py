"""Benchmarks of the operator: `pytest benchmarks/ --benchmark-only`, and scripts of their own."""
