"""From frozen features to one vector per image: CLS with mean patch, or a pyramid over taps.

``extract`` is what the frozen backbone computes and what may be cached; ``forward`` is trained.
Source: METHODS A5, B6.
"""

from abc import ABC, abstractmethod
from typing import Literal

import msgspec
import torch
from torch import Tensor, nn

from dinotrain.backbones.vit import TapNorm, VisionTransformer, ViTConfig
from dinotrain.errors import UsageError
from dinotrain.heads.pyramid import LateralPyramid
from dinotrain.heads.segmentation import tokens_to_map


class FeatureConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which features are read: ``cls_mean``, or a lateral ``pyramid`` over four ``taps``."""

    kind: Literal["cls_mean", "pyramid"] = "cls_mean"
    taps: tuple[int, ...] = ()
    tap_norm: TapNorm = "final"


class Pool(nn.Module, ABC):
    """Features of one image; ``width`` numbers."""

    width: int

    @abstractmethod
    def extract(self, backbone: VisionTransformer, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised → what the frozen backbone gives, (B, ...), cacheable."""

    @abstractmethod
    def last_block(self, depth: int) -> int:
        """Number of the last block whose output is read."""


class ClsMeanPool(Pool):
    """CLS ‖ mean patch, both after the final norm: (B, 2·D); nothing is trained."""

    def __init__(self, backbone: ViTConfig) -> None:
        super().__init__()
        self.width = 2 * backbone.embed_dim

    def extract(self, backbone: VisionTransformer, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, 2·D)."""
        output = backbone(images)
        return torch.cat((output.cls_token, output.patch_tokens.mean(dim=1)), dim=-1)

    def last_block(self, depth: int) -> int:
        """Return the final block: CLS comes after it."""
        return depth - 1

    def forward(self, features: Tensor) -> Tensor:
        """(B, 2·D) → the same."""
        return features


class LateralPyramidPool(LateralPyramid, Pool):
    """Four taps → a lateral pyramid over their maps: (B, 4·channels).

    Args:
        backbone: gives the width of the taps.
        config: exactly four taps.
        grid: (rows, cols) of the patch grid.
        channels: width of the pyramid.

    Source: METHODS B6, FPN (a).
    """

    def __init__(
        self, backbone: ViTConfig, config: FeatureConfig, grid: tuple[int, int], channels: int = 256
    ) -> None:
        if len(config.taps) != 4:
            raise UsageError(f"a pyramid reads 4 taps, {len(config.taps)} are named: {config.taps}")
        dim = backbone.embed_dim
        super().__init__([dim] * 4, one_scale=True, channels=channels)
        self.config = config
        self.grid = grid
        if config.tap_norm == "own_ln":
            self.norms = nn.ModuleList(
                nn.LayerNorm(dim, eps=backbone.layer_norm_eps) for _ in config.taps
            )

    def extract(self, backbone: VisionTransformer, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, 4, N, D)."""
        norm = "final" if self.config.tap_norm == "final" else "none"
        return torch.stack(backbone.taps(images, self.config.taps, norm), dim=1)

    def last_block(self, depth: int) -> int:
        """Return the deepest tap."""
        return max(self.config.taps)

    def forward(self, features: Tensor) -> Tensor:
        """(B, 4, N, D) → (B, 4·channels)."""
        taps = [features[:, index] for index in range(4)]
        if self.config.tap_norm == "own_ln":
            taps = [norm(tap) for norm, tap in zip(self.norms, taps, strict=True)]
        return super().forward([tokens_to_map(tap, self.grid) for tap in taps])


def build_pool(
    backbone: ViTConfig, config: FeatureConfig, image_size: tuple[int, int]
) -> ClsMeanPool | LateralPyramidPool:
    """Return the pool that a config names."""
    if config.kind == "cls_mean":
        return ClsMeanPool(backbone)
    patch = backbone.patch_size
    return LateralPyramidPool(backbone, config, (image_size[0] // patch, image_size[1] // patch))
