"""Quantisation of modules in PyTorch, before capture: every target then ships the same numbers."""
