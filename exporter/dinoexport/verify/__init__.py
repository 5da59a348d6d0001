"""Verify: the reference, the comparison with it, and the first layer that leaves it."""
