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

FeatureKind = Literal["cls", "cls_mean", "cls4", "cls4_mean", "pyramid"]
CLS_KINDS: dict[str, tuple[int, bool]] = {
    "cls": (1, False),
    "cls_mean": (1, True),
    "cls4": (4, False),
    "cls4_mean": (4, True),
}
"""Kind → (CLS tokens, with the mean patch)."""


class FeatureConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which features are read: CLS of the last block or of four, with the mean patch or without; or
    a lateral ``pyramid`` over four ``taps``.
    """

    kind: FeatureKind = "cls_mean"
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


class ClsPool(Pool):
    """CLS of the last blocks ‖ mean patch of the last, after the final norm; nothing is trained.

    Args:
        backbone: gives width and depth.
        layers: how many CLS tokens, from the last block backwards; they stand in running order.
        mean: append the mean patch.

    Source: METHODS B6 (one layer with mean), D (the released heads: 1 or 4 layers).
    """

    def __init__(self, backbone: ViTConfig, layers: int = 1, mean: bool = True) -> None:
        super().__init__()
        if layers > backbone.depth:
            raise UsageError(
                f"features of {layers} layers are asked of {backbone.name}, which has "
                f"{backbone.depth} blocks. Use cls or cls_mean."
            )
        self.first = backbone.depth - layers
        self.mean = mean
        self.width = (layers + mean) * backbone.embed_dim

    def extract(self, backbone: VisionTransformer, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, width)."""
        outputs = [
            backbone.split(backbone.norm(x))
            for index, x in backbone.run_blocks(backbone.tokens(images))
            if index >= self.first
        ]
        parts = [output.cls_token for output in outputs]
        if self.mean:
            parts.append(outputs[-1].patch_tokens.mean(dim=1))
        return torch.cat(parts, dim=-1)

    def last_block(self, depth: int) -> int:
        """Return the final block: CLS comes after it."""
        return depth - 1

    def forward(self, features: Tensor) -> Tensor:
        """(B, width) → the same."""
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
) -> ClsPool | LateralPyramidPool:
    """Return the pool that a config names."""
    if config.kind in CLS_KINDS:
        return ClsPool(backbone, *CLS_KINDS[config.kind])
    patch = backbone.patch_size
    return LateralPyramidPool(backbone, config, (image_size[0] // patch, image_size[1] // patch))
