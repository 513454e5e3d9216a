"""Benchmarks of an optimizer step and of what surrounds it; README.md says how they measure."""
