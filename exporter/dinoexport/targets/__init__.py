"""Targets: each lowers the one captured program to a format that phones run."""
