"""Benches of the kernels, one a file; `__main__` runs them all."""
