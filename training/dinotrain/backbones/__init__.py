"""Backbones: frozen feature extractors, and how their published weights become ours."""

from dinotrain.backbones.loading import load_backbone

__all__ = ["load_backbone"]
