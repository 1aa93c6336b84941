"""Benchmarks: ratios against the plain model, measured in one run. Never part of the tests."""
