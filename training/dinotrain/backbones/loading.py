"""Any backbone by name or from a file: a ``VisionTransformer`` or a ``ConvNet``, frozen."""

from pathlib import Path

import torch

from dinotrain.backbones import weights
from dinotrain.backbones.convnets.backbone import ConvNet
from dinotrain.backbones.convnets.backbone import check_image_size as check_convnet_size
from dinotrain.backbones.convnets.config import ConvNetConfig
from dinotrain.backbones.convnets.published import REPOSITORIES as CONVNET_REPOSITORIES
from dinotrain.backbones.convnets.table import build_convnet
from dinotrain.backbones.convnets.weights import (
    build_frozen,
    convnet_name,
    family_of,
    interpret,
    load_convnet,
)
from dinotrain.backbones.hub import REPOSITORIES
from dinotrain.backbones.position import PositionRule
from dinotrain.backbones.vit import VisionTransformer, ViTConfig, check_multiple
from dinotrain.backbones.weight_files import open_weights
from dinotrain.errors import UsageError

Backbone = VisionTransformer | ConvNet
BackboneConfig = ViTConfig | ConvNetConfig

NAMES: tuple[str, ...] = (*REPOSITORIES, *CONVNET_REPOSITORIES)
"""All hub names."""


def build_backbone(config: BackboneConfig) -> Backbone:
    """Make a backbone of an architecture, with torch's default weights."""
    return VisionTransformer(config) if isinstance(config, ViTConfig) else build_convnet(config)


def check_image_size(config: BackboneConfig, image_size: tuple[int, int]) -> None:
    """Refuse an image that a backbone cannot read.

    Args:
        config: the architecture.
        image_size: (height, width) in pixels.

    Raises:
        ShapeError: not a multiple of a ViT's patch, or under a CNN's largest stride.
    """
    if isinstance(config, ViTConfig):
        check_multiple(image_size, config.patch_size)
    else:
        check_convnet_size(image_size)


def load_backbone(
    source: str | Path,
    image_size: int | tuple[int, int] | None = None,
    *,
    position_rule: PositionRule | None = None,
    device: str | torch.device = "cpu",
) -> Backbone:
    """Load a frozen backbone: evaluation mode, float32, no gradients.

    Args:
        source: a hub name (optionally ``@sha256:<hex>``), a weights file, or a folder. A path that
            exists wins over a name. What a file holds is told by its keys.
        image_size: height and width in pixels that the model is meant for, only checked here.
        position_rule: see ``weights.load_backbone``; a ConvNet has no positions.
        device: where the parameters go.

    Raises:
        UsageError: an unknown name or position rule, or a rule for a ConvNet.
        WeightsError: the file is missing, corrupt, foreign or does not match its architecture.
        DownloadError: a named backbone that cannot be fetched.
        ShapeError: ``image_size`` does not suit the backbone.
    """
    if convnet_name(source) is not None:
        _refuse_rule(position_rule)
        return load_convnet(source, image_size, device=device)
    if weights.hub_name(source, NAMES) is not None:
        return weights.load_backbone(source, image_size, position_rule=position_rule, device=device)
    contents = open_weights(source)
    if family_of(contents) is None:
        return weights.load_backbone(
            contents, image_size, position_rule=position_rule, device=device
        )
    _refuse_rule(position_rule)
    check_convnet_size(image_size)
    return build_frozen(interpret(contents), device)


def _refuse_rule(position_rule: PositionRule | None) -> None:
    if position_rule is not None:
        raise UsageError(
            f"position rule '{position_rule}' was given for a convolutional backbone, which has no "
            "positions. Leave it out."
        )
