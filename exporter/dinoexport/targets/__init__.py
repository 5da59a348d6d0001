"""Targets: one folder each, with lower, quantize and runtime; one line in the table adds one."""
