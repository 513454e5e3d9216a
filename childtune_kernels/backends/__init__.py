"""The columns of the grid: one package or module a backend, chosen by registry.py."""
