"""From frozen features to one vector per image: CLS with mean patch, or a pyramid over taps.

``extract`` is what the frozen backbone computes and what may be cached; ``forward`` is trained.
Source: METHODS A5, B6.
"""

from abc import ABC, abstractmethod
from typing import Literal

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinotrain.backbones.vit import TapNorm, VisionTransformer, ViTConfig
from dinotrain.errors import UsageError


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


class LateralPyramid(Pool):
    """Four taps → maps at strides ¼, ½, 1 and 2 of a patch → top-down sums → mean of each.

    Args:
        backbone: gives the width of the taps.
        config: exactly four taps.
        grid: (rows, cols) of the patch grid.
        channels: width of the pyramid; the result has 4·channels numbers.

    Source: METHODS B6, FPN (a).
    """

    def __init__(
        self, backbone: ViTConfig, config: FeatureConfig, grid: tuple[int, int], channels: int = 256
    ) -> None:
        super().__init__()
        if len(config.taps) != 4:
            raise UsageError(f"a pyramid reads 4 taps, {len(config.taps)} are named: {config.taps}")
        self.config = config
        self.grid = grid
        self.width = 4 * channels
        dim = backbone.embed_dim
        if config.tap_norm == "own_ln":
            self.norms = nn.ModuleList(
                nn.LayerNorm(dim, eps=backbone.layer_norm_eps) for _ in config.taps
            )
        self.lateral = nn.ModuleList(nn.Conv2d(dim, channels, 1) for _ in config.taps)
        self.up4 = nn.ConvTranspose2d(channels, channels, kernel_size=4, stride=4)
        self.up2 = nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)
        self.smooth = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in config.taps
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
        levels = [self._level(features[:, index], index) for index in range(4)]
        levels = [
            self.up4(levels[0]),
            self.up2(levels[1]),
            levels[2],
            F.max_pool2d(levels[3], 2, ceil_mode=True),
        ]
        for index in (2, 1, 0):
            rows, cols = levels[index].shape[-2:]
            above = F.interpolate(levels[index + 1], scale_factor=2.0, mode="nearest")
            levels[index] = levels[index] + above[..., :rows, :cols]
        pooled = [
            smooth(level).mean(dim=(2, 3))
            for smooth, level in zip(self.smooth, levels, strict=True)
        ]
        return torch.cat(pooled, dim=-1)

    def _level(self, tap: Tensor, index: int) -> Tensor:
        if self.config.tap_norm == "own_ln":
            tap = self.norms[index](tap)
        maps = tap.transpose(1, 2).reshape(tap.shape[0], tap.shape[2], *self.grid)
        return self.lateral[index](maps)


def build_pool(
    backbone: ViTConfig, config: FeatureConfig, image_size: tuple[int, int]
) -> ClsMeanPool | LateralPyramid:
    """Return the pool that a config names."""
    if config.kind == "cls_mean":
        return ClsMeanPool(backbone)
    patch = backbone.patch_size
    return LateralPyramid(backbone, config, (image_size[0] // patch, image_size[1] // patch))
