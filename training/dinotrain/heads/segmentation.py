"""From three taps of a backbone to logits per pixel: the multi-scale decoder of segmentation.

The deepest map is enlarged in four stages; the two shallower ones join on the way. Every size is
fixed when the decoder is built, so that it captures into one static graph. Source: METHODS C.
"""

from collections.abc import Mapping, Sequence

import msgspec
import torch.nn.functional as F
from torch import Tensor, nn

from dinotrain.errors import ShapeError, UsageError

MAX_GROUPS = 32


class DecoderConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Widths of the four stages, and how much is dropped in training."""

    channels: tuple[int, int, int, int] = (256, 128, 64, 64)
    dropout: float = 0.1


def group_count(channels: int) -> int:
    """Return the largest divisor of ``channels`` up to 32: the groups of a normalisation."""
    return next(n for n in range(min(channels, MAX_GROUPS), 0, -1) if channels % n == 0)


class ConvBlock(nn.Module):
    """1×1 → GN → GELU → 3×3 → GN → GELU → Dropout2d, over x and, where there is one, a skip.

    The 1×1 convolution over [x, resized skip] is held as two, one per part, whose results are
    added. The skip's part runs before the resize: a 1×1 convolution without bias and a bilinear
    resize commute, and the resize then carries ``channels`` planes instead of the backbone's width
    (at 518 px on ViT-B: 64 instead of 768 planes of 148×148).

    Args:
        width: channels of x.
        channels: channels of the result.
        dropout: share of channels dropped in training.
        skip_width: channels of the skip; 0 where there is none.
    """

    def __init__(self, width: int, channels: int, dropout: float, skip_width: int = 0) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, channels, 1, bias=False)
        self.reduce_skip = nn.Conv2d(skip_width, channels, 1, bias=False) if skip_width else None
        self.norm1 = nn.GroupNorm(group_count(channels), channels)
        self.mix = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(group_count(channels), channels)
        self.dropout = nn.Dropout2d(dropout)
        # Kaiming-normal, fan_in of the convolution as a whole: the parts share one variance.
        gain = nn.init.calculate_gain("relu")
        nn.init.normal_(self.reduce.weight, std=gain / (width + skip_width) ** 0.5)
        if self.reduce_skip is not None:
            nn.init.normal_(self.reduce_skip.weight, std=gain / (width + skip_width) ** 0.5)
        nn.init.kaiming_normal_(self.mix.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, x: Tensor, skip: Tensor | None, size: tuple[int, int]) -> Tensor:
        """(B, width, rows, cols), (B, skip_width, any, any) → (B, channels, rows, cols).

        Args:
            x: the map from below.
            skip: a tap, of any size; None where the block has none.
            size: (rows, cols) of ``x``.
        """
        y = self.reduce(x)
        if self.reduce_skip is not None and skip is not None:
            y = y + _resize(self.reduce_skip(skip), size)
        y = F.gelu(self.norm1(y))
        return self.dropout(F.gelu(self.norm2(self.mix(y))))


class SegmentationDecoder(nn.Module):
    """Four stages of ``ConvBlock`` and ×2 bilinear, then 1×1 and a resize to the image.

    Args:
        widths: channels of the taps, shallow to deep; all D for a ViT.
        grid: (rows, cols) of the deepest tap; the others may have any size.
        image_size: (height, width) of the result.
        classes: number of classes, background included.
        config: widths of the stages and dropout.

    Raises:
        UsageError: not three taps, or fewer than two classes.

    Source: METHODS C, Stages.
    """

    def __init__(
        self,
        widths: Sequence[int],
        grid: tuple[int, int],
        image_size: tuple[int, int],
        classes: int,
        config: DecoderConfig | None = None,
    ) -> None:
        super().__init__()
        if len(widths) != 3:
            raise UsageError(f"the decoder reads 3 taps, {len(widths)} are named: {tuple(widths)}")
        if classes < 2:
            raise UsageError(f"{classes} class: segmentation needs at least 2, background included")
        config = config or DecoderConfig()
        shallow, mid, deep = widths
        one, two, three, four = config.channels
        self.widths = (shallow, mid, deep)
        self.grid = grid
        self.image_size = image_size
        self.classes = classes
        self.stage1 = ConvBlock(deep, one, config.dropout)
        self.stage2 = ConvBlock(one, two, config.dropout, mid)
        self.stage3 = ConvBlock(two, three, config.dropout, shallow)
        self.stage4 = ConvBlock(three, four, config.dropout)
        self.classify = nn.Conv2d(four, classes, 1)
        nn.init.kaiming_normal_(self.classify.weight, mode="fan_in", nonlinearity="relu")
        nn.init.zeros_(self.classify.bias)  # type: ignore[arg-type]

    def forward(self, pooled: Mapping[str, Sequence[Tensor]]) -> Tensor:
        """Give logits per pixel.

        Args:
            pooled: of the only input, three maps (B, width, rows, cols), shallow to deep.

        Returns:
            (B, classes, height, width), the dtype of the taps.

        Raises:
            ShapeError: not three maps, or widths or the deepest size other than built for.
        """
        (taps,) = pooled.values()
        self._check(taps)
        shallow, mid, deep = taps
        x = self.stage1(deep, None, self._size(1))
        x = self.stage2(_resize(x, self._size(2)), mid, self._size(2))
        x = self.stage3(_resize(x, self._size(4)), shallow, self._size(4))
        x = self.stage4(_resize(x, self._size(8)), None, self._size(8))
        return _resize(self.classify(_resize(x, self._size(16))), self.image_size)

    def _size(self, times: int) -> tuple[int, int]:
        return self.grid[0] * times, self.grid[1] * times

    def _check(self, taps: Sequence[Tensor]) -> None:
        found = tuple(tap.shape[1] for tap in taps)
        if found != self.widths or tuple(taps[-1].shape[-2:]) != self.grid:
            raise ShapeError(
                f"the decoder was built for taps of {self.widths} channels, the deepest "
                f"{self.grid[0]}×{self.grid[1]}; given {[tuple(tap.shape) for tap in taps]}"
            )


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize bilinearly, corners not aligned; a map that has the size is left alone."""
    if tuple(x.shape[-2:]) == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
