"""Benchmarks: run bundles and builds, and say how each figure was obtained (no torch)."""
