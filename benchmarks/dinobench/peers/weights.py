"""The one model that all candidates are: ViT-S/14 of random weights, CLS → linear → softmax.

It is transformers' model first, as a user of the peers has it; its weights are read into a
checkpoint as any published file of that layout is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

CLASSES = ("left", "right", "up", "down")
SEED = 20260202
TRAINED_SIZE = 518
"""Pixels that the position embedding is made for, as published: other sizes resample it."""

HOT_CHANNELS = 4
HOT_FACTOR = 20.0


def make_peer_model(size: int, hot: bool, architecture: Mapping[str, Any] | None = None) -> Any:
    """Return the peer's module: normalised float pixels (1, 3, S, S) → probabilities (1, 4).

    Args:
        size: pixels of a side, for the module's example input.
        hot: plant outlier channels in the residual stream of the middle blocks, as trained DINOv2
            has: they are what makes 8-bit activations hard.
        architecture: changes to ViT-S/14's ``Dinov2Config``.
    """
    import torch
    from torch import nn
    from transformers import Dinov2Config, Dinov2Model

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            values: dict[str, Any] = {
                "hidden_size": 384,
                "num_hidden_layers": 12,
                "num_attention_heads": 6,
                "mlp_ratio": 4,
                "image_size": TRAINED_SIZE,
                "patch_size": 14,
            }
            config = Dinov2Config(**(values | dict(architecture or {})))
            self.backbone = Dinov2Model(config)
            self.head = nn.Linear(config.hidden_size, len(CLASSES))
            self.example = torch.zeros(1, 3, size, size)

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            pooled = self.backbone(pixel_values).pooler_output
            return torch.softmax(self.head(pooled), dim=-1)

    torch.manual_seed(SEED)
    model = Classifier()
    _randomise_(model, hot)
    return model.eval().requires_grad_(False)


def _randomise_(model: Any, hot: bool) -> None:
    """Fill every parameter at random, in place, whatever the library's own start is."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            # Norms and LayerScale around 1; matrices of a spread that keeps attention uneven.
            centre = 1.0 if name.endswith(("norm1.weight", "norm2.weight", "lambda1")) else 0.0
            centre = 1.0 if name.endswith("layernorm.weight") else centre
            spread = 0.05 if parameter.ndim > 1 else 0.1
            if name.startswith("head."):
                spread = 0.1
            parameter.copy_(centre + spread * noise)
        if hot:
            layers = [m for n, m in model.named_modules() if n.endswith("layer_scale2")]
            channels = torch.randperm(layers[0].lambda1.numel(), generator=generator)
            for layer in layers[len(layers) // 4 : -1]:
                layer.lambda1[channels[:HOT_CHANNELS]] *= HOT_FACTOR


def write_checkpoint(model: Any, size: int, path: Path) -> Path:
    """Write the peer's model as a dinoexport checkpoint of a classifier.

    Raises:
        WeightsError: its backbone is no layout that is known.
    """
    from dinotrain.backbones.layouts import detect, to_ours
    from dinotrain.checkpoint import CheckpointConfig, save_checkpoint
    from dinotrain.heads.branch import HeadConfig
    from dinotrain.heads.pool import FeatureConfig
    from dinotrain.model import TaskModel

    theirs = model.backbone.state_dict()
    backbone, state = to_ours(theirs, detect(theirs))
    config = CheckpointConfig(
        task="classify",
        backbone=backbone,
        image_size=(size, size),
        features=FeatureConfig(kind="cls"),
        head=HeadConfig(kind="probe"),
        classes=CLASSES,
        trained_on="nothing (random weights)",
        notice="Random weights.",
    )
    ours = TaskModel(config)
    ours.backbone.load_state_dict(state)
    (linear,) = (m for m in ours.head.modules() if type(m).__name__ == "Linear")
    linear.load_state_dict(model.head.state_dict())
    return save_checkpoint(ours, config, path)
