"""Position embeddings at another size than they were trained for: the published rules.

Each library that ships DINOv2 resamples the 37×37 grid in its own way, and each way gives other
features. The rule is therefore part of a checkpoint, never a guess.
"""

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from dinotrain.errors import ShapeError, unknown_name

PositionRule = Literal["scale", "size", "size_antialias"]
"""``scale``: hub without registers, scale (h + 0.1)/grid, no antialias. ``size``: transformers
without registers, target size, no antialias. ``size_antialias``: hub and transformers with
registers, timm. Source: METHODS A4."""

HUB_OFFSET = 0.1


def check_rule(rule: str) -> PositionRule:
    """Return ``rule`` itself, or raise UsageError with the nearest known one."""
    if rule not in get_args(PositionRule):
        raise unknown_name("position rule", rule, get_args(PositionRule))
    return rule  # type: ignore[return-value]


def resample_position(
    pos_embed: Tensor, grid: tuple[int, int], target: tuple[int, int], rule: PositionRule
) -> Tensor:
    """Resample patch position embeddings to a target grid, in float32, bicubic.

    Args:
        pos_embed: (1, rows·cols, D), patches only (CLS excluded), row-major.
        grid: (rows, cols) that ``pos_embed`` was trained for.
        target: (rows, cols) wanted.
        rule: how to resample.

    Returns:
        (1, target rows·cols, D), the dtype of ``pos_embed``.

    Raises:
        ShapeError: the token count is not rows·cols.

    Source: METHODS A4.
    """
    rows, cols = grid
    if pos_embed.shape[1] != rows * cols:
        raise ShapeError(
            f"position embedding has {pos_embed.shape[1]} patches, its grid {rows}×{cols} "
            f"has {rows * cols}"
        )
    # The published code returns early only for a square input of the trained size.
    if target == grid and target[0] == target[1]:
        return pos_embed
    dim = pos_embed.shape[-1]
    planes = pos_embed.float().reshape(1, rows, cols, dim).permute(0, 3, 1, 2)
    if rule == "scale":
        factors = ((target[0] + HUB_OFFSET) / rows, (target[1] + HUB_OFFSET) / cols)
        planes = F.interpolate(planes, scale_factor=factors, mode="bicubic", antialias=False)
    else:
        planes = F.interpolate(
            planes, size=target, mode="bicubic", antialias=rule == "size_antialias"
        )
    if tuple(planes.shape[-2:]) != target:
        raise ShapeError(f"rule {rule} gave a grid of {tuple(planes.shape[-2:])}, wanted {target}")
    flat = planes.permute(0, 2, 3, 1).reshape(1, target[0] * target[1], dim)
    return flat.to(dtype=pos_embed.dtype).contiguous()
