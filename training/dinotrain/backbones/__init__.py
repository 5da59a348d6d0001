"""Backbones: frozen feature extractors, and how their published weights become ours."""
