"""Benchmarks of an optimizer step; README.md says how they measure."""
