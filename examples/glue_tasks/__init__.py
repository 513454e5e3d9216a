"""Rooms of glue.py: tasks, data, metrics, the grid of runs, one run, results, the report."""
