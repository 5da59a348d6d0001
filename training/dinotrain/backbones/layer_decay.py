"""Layer-wise decay of the learning rate: which layer a parameter belongs to, and its group.

Fine-tuning reads it: early layers are general and move little, late ones move more. Source:
METHODS B7, F.
"""

from typing import TypedDict

from torch import nn

from dinotrain.backbones.convnets.backbone import ConvNet
from dinotrain.backbones.vit import VisionTransformer
from dinotrain.errors import UsageError


class ParameterGroup(TypedDict):
    """One group of a torch optimiser."""

    params: list[nn.Parameter]
    lr: float
    weight_decay: float


def parameter_depths(backbone: VisionTransformer | ConvNet) -> dict[str, int]:
    """{parameter: depth} in a backbone of n blocks.

    Depth 0 is what comes before the blocks (patches, positions, tokens; a stem), 1 to n are the
    blocks, n + 1 is what comes after them (the final norm; a projection).
    """
    if isinstance(backbone, ConvNet):
        return backbone.parameter_depths()
    return vit_depths(backbone)


def block_count(backbone: VisionTransformer | ConvNet) -> int:
    """Return n: how many blocks a backbone has."""
    if isinstance(backbone, ConvNet):
        return sum(stage.blocks for stage in backbone.config.stages)
    return backbone.config.depth


def vit_depths(backbone: VisionTransformer) -> dict[str, int]:
    """{parameter: depth} of a Vision Transformer; see ``parameter_depths``."""
    groups = [*backbone.blocks, backbone.norm]
    depths = {
        id(parameter): depth
        for depth, module in enumerate(groups, start=1)
        for parameter in module.parameters()
    }
    return {name: depths.get(id(value), 0) for name, value in backbone.named_parameters()}


def parameter_groups(
    backbone: VisionTransformer | ConvNet,
    *,
    lr: float,
    layer_decay: float = 1.0,
    weight_decay: float = 0.0,
) -> list[ParameterGroup]:
    """Groups of the parameters that train: lr · layer_decay^(n + 1 − depth).

    Args:
        backbone: n blocks; parameters without ``requires_grad`` are left out.
        lr: of what comes after the last block.
        layer_decay: factor per block on the way back to the input, in (0, 1]; 1 is none.
        weight_decay: of weights; biases, normalisations and LayerScale (all that has one
            dimension) have none.

    Returns:
        At most two groups per depth, from the input on; none is empty.

    Raises:
        UsageError: ``layer_decay`` is outside (0, 1].

    Source: METHODS B7, F (as DINOv2 counts its layers).
    """
    if not 0 < layer_decay <= 1:
        raise UsageError(f"layer decay {layer_decay} is not accepted; above 0 and at most 1 is")
    depths = parameter_depths(backbone)
    last = block_count(backbone) + 1
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, value in backbone.named_parameters():
        if value.requires_grad:
            groups.setdefault((depths[name], value.ndim > 1), []).append(value)
    return [
        ParameterGroup(
            params=values,
            lr=lr * layer_decay ** (last - depth),
            weight_decay=weight_decay if decays else 0.0,
        )
        for (depth, decays), values in sorted(groups.items(), key=lambda item: item[0])
    ]
