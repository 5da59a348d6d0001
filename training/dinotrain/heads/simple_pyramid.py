"""The simple feature pyramid: four scales from the last map only, without lateral connections.

Source: METHODS B6, FPN (b), after ViTDet (arXiv 2203.16527).
"""

from collections.abc import Sequence

from torch import Tensor, nn

from dinotrain.errors import UsageError
from dinotrain.heads.pyramid import LEVELS, halve, pool_levels

VIT_SCALES = (4.0, 2.0, 1.0, 0.5)
"""Of a ViT's last map: strides ¼, ½, 1 and 2 of a patch."""

CNN_SCALES = (8.0, 4.0, 2.0, 1.0)
"""Of a CNN's last map, at stride 32: the strides 4, 8, 16 and 32 of its taps."""


class MapNorm(nn.Module):
    """LayerNorm over the channels of each place of a map."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → the same."""
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Halve(nn.Module):
    """Maximum of each 2×2."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, ⌈H/2⌉, ⌈W/2⌉)."""
        return halve(x)


class SimplePyramid(nn.Module):
    """One map → 1×1 → four scales side by side → 3×3 → mean of each.

    Each ×2 is a deconvolution, with a norm and GELU between two of them; a norm follows every
    convolution. Without these, all up to the mean would be linear, and the levels would tell
    little more than the mean of the map.

    Args:
        in_channels: of the map.
        scales: of the four levels against the map, each half the one before; see ``VIT_SCALES``
            and ``CNN_SCALES``.
        channels: width of the pyramid; ``width``, of the result, is four times that.

    Raises:
        UsageError: scales that are not four, or not of ½, 1, 2, 4, ….
    """

    def __init__(
        self, in_channels: int, scales: Sequence[float] = VIT_SCALES, channels: int = 256
    ) -> None:
        super().__init__()
        if len(scales) != LEVELS:
            raise UsageError(f"a pyramid has {LEVELS} scales, {len(scales)} are given: {scales}")
        self.width = LEVELS * channels
        self.reduce = nn.Sequential(
            nn.Conv2d(in_channels, channels, 1, bias=False), MapNorm(channels)
        )
        self.resample = nn.ModuleList(_resampler(channels, scale) for scale in scales)
        self.smooth = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1, bias=False), MapNorm(channels)
            )
            for _ in scales
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), the last map → (B, width)."""
        x = self.reduce(x)
        return pool_levels([resample(x) for resample in self.resample], self.smooth)


def _resampler(channels: int, scale: float) -> nn.Sequential:
    """Return layers that enlarge a map by a power of two, or halve it."""
    if scale == 0.5:
        return nn.Sequential(Halve())
    doublings = int(scale).bit_length() - 1
    if scale != 2**doublings:
        raise UsageError(f"a pyramid has the scale {scale}; 0.5, 1 and powers of 2 are accepted")
    layers: list[nn.Module] = []
    for step in range(doublings):
        if step:
            layers += [MapNorm(channels), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2))
    return nn.Sequential(*layers)
