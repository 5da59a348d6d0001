"""Metrics: how predictions are judged, in the units of the targets."""
