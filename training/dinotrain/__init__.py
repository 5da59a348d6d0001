"""Training: images and labels in, one checkpoint out (frozen DINOv2 backbone + light head)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dinotrain.backbones import load_backbone

__all__ = ["load_backbone"]


def __getattr__(name: str):
    # Lazy, so that the command line can read names and errors without loading torch.
    if name == "load_backbone":
        from dinotrain.backbones import load_backbone

        return load_backbone
    raise AttributeError(f"module 'dinotrain' has no attribute {name!r}")
