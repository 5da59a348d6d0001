"""From a backbone to what a head reads: one vector per image, its tokens, or some of its maps.

``extract`` is what the backbone computes and what may be cached; ``forward`` is trained. Both work
on either family of backbones. Source: METHODS A5, B6, C, G.
"""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import msgspec
import torch
from torch import Tensor, nn

from dinotrain.backbones.convnets.backbone import ConvNet
from dinotrain.backbones.convnets.config import ConvNetConfig
from dinotrain.backbones.loading import Backbone, BackboneConfig
from dinotrain.backbones.vit import TapNorm, VisionTransformer, ViTConfig, map_to_tokens
from dinotrain.errors import UsageError
from dinotrain.heads.pyramid import LateralPyramid
from dinotrain.heads.simple_pyramid import CNN_SCALES, VIT_SCALES, MapNorm, SimplePyramid

FeatureKind = Literal[
    "cls",
    "cls_mean",
    "cls_quarters",
    "cls4",
    "cls4_mean",
    "cls4_quarters",
    "pooled",
    "pyramid",
    "sfp",
    "tokens",
    "maps",
]
Features = tuple[Tensor, ...]
"""What one image, or a batch of them, gives; the batch is each tensor's first axis."""


class ClsParts(NamedTuple):
    """What stands in a vector, in this order, each part as wide as the backbone."""

    layers: int = 1
    """CLS tokens of the last blocks."""
    mean: bool = True
    """The mean patch of the last block."""
    quarters: bool = False
    """Its mean patch in each quarter of the image: top left, top right, bottom left, bottom right.
    """

    @property
    def count(self) -> int:
        """Number of parts."""
        return self.layers + self.mean + 4 * self.quarters


CLS_KINDS: dict[str, ClsParts] = {
    "cls": ClsParts(1, mean=False),
    "cls_mean": ClsParts(1),
    "cls_quarters": ClsParts(1, quarters=True),
    "cls4": ClsParts(4, mean=False),
    "cls4_mean": ClsParts(4),
    "cls4_quarters": ClsParts(4, quarters=True),
}
TAPS_READ = {"pyramid": 4, "sfp": 1, "tokens": 1, "maps": 3}
"""Kind → how many taps it reads; the others read the final output."""


class FeatureConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which features are read.

    A vector: CLS of the last block or of four, bare, with the mean patch, or with that and the mean
    of each quarter of the image (ViT); the pooled map (CNN); a lateral ``pyramid`` over four
    ``taps``; a simple one, ``sfp``, over the last map. Its tokens, for the query decoder. Or three
    ``maps``, for the segmentation decoder. Taps are blocks of a ViT (from 0), strides of a CNN.
    """

    kind: FeatureKind = "cls_mean"
    taps: tuple[int, ...] = ()
    tap_norm: TapNorm = "final"


class Pool(nn.Module, ABC):
    """Features of one image; ``width`` is that of a vector or token."""

    width: int
    deepest: int | None = None
    """The deepest tap that is read; None where it is the final output."""
    gives_vector: bool = True
    """Whether one vector per image comes out; else tokens or maps."""
    reads_cls_only: bool = False
    """Whether of the deepest block the CLS token alone is read."""

    @abstractmethod
    def extract(self, backbone: Backbone, images: Tensor) -> Features:
        """(B, 3, H, W) normalised → what the backbone gives, (B, …) each, cacheable."""


class ClsPool(Pool):
    """CLS of the last blocks ‖ mean patches of the last, after the final norm; nothing is trained.

    Args:
        backbone: gives width and depth.
        parts: what is read; CLS tokens stand in running order.
        image_size: (height, width) in pixels.

    Source: METHODS B6 (one layer with mean), D (the released heads: 1 or 4 layers). The quarters
    are this project's: they tell where in the image something is, which a mean does not.
    """

    def __init__(self, backbone: ViTConfig, parts: ClsParts, image_size: tuple[int, int]) -> None:
        super().__init__()
        if parts.layers > backbone.depth:
            raise UsageError(
                f"features of {parts.layers} layers are asked of {backbone.name}, which has "
                f"{backbone.depth} blocks. Use cls or cls_mean."
            )
        self.first = backbone.depth - parts.layers
        self.parts = parts
        self.grid = backbone.tap_grid(backbone.last_tap, image_size)
        self.width = parts.count * backbone.embed_dim
        self.reads_cls_only = not (parts.mean or parts.quarters)

    def extract(self, backbone: VisionTransformer, images: Tensor) -> Features:  # type: ignore[override]
        """(B, 3, H, W) → (B, width)."""
        outputs = [
            backbone.split(backbone.norm(x))
            for index, x in backbone.run_blocks(backbone.tokens(images))
            if index >= self.first
        ]
        parts = [output.cls_token for output in outputs]
        patches = outputs[-1].patch_tokens
        if self.parts.mean:
            parts.append(patches.mean(dim=1))
        if self.parts.quarters:
            parts += mean_of_quarters(patches, self.grid)
        # One part is not joined: exporters drop a join of one, and its value's name with it.
        return (torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0],)

    def forward(self, features: Features) -> Tensor:
        """(B, width) → the same."""
        return features[0]


def mean_of_quarters(patches: Tensor, grid: tuple[int, int]) -> list[Tensor]:
    """Average patch tokens over each quarter of the image, row by row.

    Args:
        patches: (B, rows·cols, D).
        grid: (rows, cols); a middle row or column belongs to both halves.

    Returns:
        Four of (B, D).
    """
    rows, cols = grid
    places = patches.unflatten(1, grid)
    halves = [(slice(0, (n + 1) // 2), slice(n // 2, n)) for n in (rows, cols)]
    return [places[:, y, x].mean(dim=(1, 2)) for y in halves[0] for x in halves[1]]


class PooledPool(Pool):
    """The mean over all places of a CNN's last map; nothing is trained. Source: METHODS G."""

    def __init__(self, backbone: ConvNetConfig) -> None:
        super().__init__()
        self.width = backbone.pooled_width

    def extract(self, backbone: ConvNet, images: Tensor) -> Features:  # type: ignore[override]
        """(B, 3, H, W) → (B, width)."""
        return (backbone.pooled(images),)

    def forward(self, features: Features) -> Tensor:
        """(B, width) → the same."""
        return features[0]


class TapPool(Pool):
    """Maps of some taps, each normalised as the config says.

    Args:
        backbone: gives widths and sizes.
        config: kind and taps; no taps take the backbone's own.
        image_size: (height, width) in pixels.

    Attributes:
        widths: channels of the maps, shallow to deep.
        grids: (rows, cols) of the maps.
    """

    def __init__(
        self, backbone: BackboneConfig, config: FeatureConfig, image_size: tuple[int, int]
    ) -> None:
        super().__init__()
        self.gives_vector = config.kind in ("pyramid", "sfp")
        count = TAPS_READ[config.kind]
        taps = config.taps or own_taps(backbone, config.kind)
        if len(taps) != count:
            raise UsageError(
                f"{config.kind} features read {count} taps, {len(taps)} are named: "
                f"{', '.join(map(str, taps))}"
            )
        self.taps = taps
        self.deepest = max(taps)
        self.norm = config.tap_norm
        self.widths = tuple(backbone.tap_width(tap) for tap in taps)
        self.width = self.widths[-1]
        self.grids = tuple(backbone.tap_grid(tap, image_size) for tap in taps)
        eps = getattr(backbone, "layer_norm_eps", 1e-6)
        own = self.norm == "own_ln"
        self.norms = nn.ModuleList(MapNorm(width, eps) for width in self.widths if own)

    def extract(self, backbone: Backbone, images: Tensor) -> Features:
        """(B, 3, H, W) → one (B, C, rows, cols) per tap."""
        norm = "final" if self.norm == "final" else "none"
        return tuple(backbone.maps(images, self.taps, norm))

    def forward(self, features: Features) -> "list[Tensor] | Tensor":
        """Maps → maps, with their own norms where these are asked for."""
        if not self.norms:
            return list(features)
        return [norm(x) for norm, x in zip(self.norms, features, strict=True)]


class TokenPool(TapPool):
    """The places of the last map, one token each."""

    def forward(self, features: Features) -> Tensor:
        """(B, C, rows, cols) → (B, rows·cols, C)."""
        (x,) = super().forward(features)
        return map_to_tokens(x)


class PyramidPool(TapPool):
    """A feature pyramid: lateral over four taps, or a simple one over the last map.

    Args:
        backbone: see ``TapPool``.
        config: ``pyramid`` or ``sfp``.
        image_size: see ``TapPool``.
        channels: width of the pyramid; the vector is four times that.

    Source: METHODS B6, FPN (a) and (b); G.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        config: FeatureConfig,
        image_size: tuple[int, int],
        channels: int = 256,
    ) -> None:
        super().__init__(backbone, config, image_size)
        # A ViT's maps are of one size; a CNN's halve from tap to tap.
        vit = isinstance(backbone, ViTConfig)
        self.pyramid: nn.Module
        if config.kind == "pyramid":
            self.pyramid = LateralPyramid(self.widths, one_scale=vit, channels=channels)
        else:
            scales = VIT_SCALES if vit else CNN_SCALES
            self.pyramid = SimplePyramid(self.widths[0], scales, channels)
        self.width = 4 * channels

    def forward(self, features: Features) -> Tensor:
        """Maps → (B, 4·channels)."""
        maps = super().forward(features)
        return self.pyramid(maps if isinstance(self.pyramid, LateralPyramid) else maps[0])


def own_taps(backbone: BackboneConfig, kind: FeatureKind) -> tuple[int, ...]:
    """Return the taps that a kind reads where none are named."""
    count = TAPS_READ[kind]
    return (backbone.last_tap,) if count == 1 else backbone.default_taps(count)


def build_pool(
    backbone: BackboneConfig, config: FeatureConfig, image_size: tuple[int, int]
) -> Pool:
    """Return the pool that a config names.

    Raises:
        UsageError: the backbone has no such features, or not those taps.
    """
    vit = isinstance(backbone, ViTConfig)
    if config.kind in CLS_KINDS:
        if not vit:
            raise UsageError(
                f"{backbone.name} has no CLS token, so no {config.kind} features. Use pooled."
            )
        return ClsPool(backbone, CLS_KINDS[config.kind], image_size)
    if config.kind == "pooled":
        if vit:
            raise UsageError(f"{backbone.name} has no pooled map. Use cls_mean.")
        return PooledPool(backbone)
    pools = {"maps": TapPool, "tokens": TokenPool, "pyramid": PyramidPool, "sfp": PyramidPool}
    return pools[config.kind](backbone, config, image_size)
