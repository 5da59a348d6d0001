"""Feature pyramids over the maps of one image: what they share, and the lateral one.

A pyramid reads maps, (B, C, H, W), of a ViT (all of one size) or of a CNN (each half the one
before), shallow to deep, and gives one vector; ``simple_pyramid`` holds the other kind. Source:
METHODS B6, FPN (a).
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinotrain.errors import ShapeError, UsageError

LEVELS = 4


class LateralPyramid(nn.Module):
    """Four maps → 1×1 → four scales → top-down sums → 3×3 → mean of each.

    Args:
        in_channels: of the four maps, shallow to deep.
        one_scale: the maps are of one size (taps of a ViT) and are resampled ×4, ×2, ×1 and ×½;
            else each is half the one before (taps of a CNN), and stays as it is.
        channels: width of the pyramid; ``width``, of the result, is four times that.

    Raises:
        UsageError: another number of maps.
    """

    def __init__(self, in_channels: Sequence[int], *, one_scale: bool, channels: int = 256) -> None:
        super().__init__()
        if len(in_channels) != LEVELS:
            raise UsageError(f"a pyramid reads {LEVELS} maps, {len(in_channels)} are given")
        self.width = LEVELS * channels
        self.one_scale = one_scale
        self.lateral = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in in_channels)
        if one_scale:
            self.up4 = nn.ConvTranspose2d(channels, channels, kernel_size=4, stride=4)
            self.up2 = nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)
        self.smooth = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in range(LEVELS)
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Four (B, C, H, W), shallow to deep → (B, width).

        Raises:
            ShapeError: a map is not half the size of the one before, where it should be.
        """
        levels = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        if self.one_scale:
            levels = [self.up4(levels[0]), self.up2(levels[1]), levels[2], halve(levels[3])]
        return pool_levels(top_down(levels), self.smooth)


def halve(x: Tensor) -> Tensor:
    """(B, C, H, W) → (B, C, ⌈H/2⌉, ⌈W/2⌉), the maximum of each 2×2."""
    return F.max_pool2d(x, 2, ceil_mode=True)


def top_down(levels: Sequence[Tensor]) -> list[Tensor]:
    """Add to each level, fine to coarse, the sum of all coarser ones, by nearest neighbour.

    Args:
        levels: (B, C, H, W) each, every one half the size of the one before, rounded up.

    Returns:
        As many, of the same shapes.

    Raises:
        ShapeError: sizes that do not follow from each other.
    """
    sums = list(levels)
    for index in range(len(sums) - 2, -1, -1):
        fine, coarse = tuple(sums[index].shape[-2:]), tuple(sums[index + 1].shape[-2:])
        if coarse != ((fine[0] + 1) // 2, (fine[1] + 1) // 2):
            raise ShapeError(
                f"pyramid level {index + 1} is {coarse[0]}×{coarse[1]} and the one before it "
                f"{fine[0]}×{fine[1]}; each must be half of the one before, rounded up"
            )
        above = F.interpolate(sums[index + 1], scale_factor=2.0, mode="nearest")
        for dim, size in zip((-2, -1), fine, strict=True):
            # Not where nothing is cut off: Core ML's converter refuses slices that take all.
            above = above.narrow(dim, 0, size) if above.shape[dim] != size else above
        sums[index] = sums[index] + above
    return sums


def pool_levels(levels: Sequence[Tensor], smooth: Iterable[nn.Module]) -> Tensor:
    """Smooth each level, take its mean over all places, and join: (B, C, H, W)s → (B, ΣC)."""
    pooled = [layer(x).mean(dim=(2, 3)) for layer, x in zip(smooth, levels, strict=True)]
    return torch.cat(pooled, dim=-1)
