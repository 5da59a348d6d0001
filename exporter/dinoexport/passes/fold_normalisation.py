"""Pass: mean and std of the pixels into the first convolution."""

from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor, nn

from dinoexport.graph.deploy_backbones import DeployViT, Normalise
from dinoexport.graph.deploy_model import DeployModel
from dinoexport.passes.base import Pass
from dinoexport.passes.facts import NORMALISATION_FOLDED


@final
@dataclass(frozen=True)
class FoldNormalisation(Pass):
    """Let the first convolution read pixels as they are.

    A ViT's has no padding, so mean and std both go; a ConvNet's pads normalised images with zeros,
    so the mean is taken off each pixel and std alone goes.

    Before:        y = conv((x/255 − mean)/std; W, b)
    After, ViT:    y = conv(x; W/(255·std), b − Σ W·mean/std)
    After, CNN:    y = conv(x − 255·mean; W/(255·std), b)
    """

    name = "fold_normalisation"
    ensures = frozenset({NORMALISATION_FOLDED})

    def apply(self, model: DeployModel) -> None:
        """See Pass.apply."""
        backbone = model.backbone
        first = cast("Normalise", backbone.normalise)
        if isinstance(backbone, DeployViT):
            fold_normalisation_(backbone.patch_embed.proj, first.pixel_mean, first.pixel_std)
            backbone.normalise = nn.Identity()
            return
        fold_scale_(backbone.net.first_convolution(), first.pixel_std)
        backbone.normalise = SubtractMean(first.pixel_mean * 255)


class SubtractMean(nn.Module):
    """x − mean, of pixels x in 0..255; mean is (1, 3, 1, 1)."""

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        # A parameter, so that it is rounded as an artifact stores it.
        self.pixel_mean = nn.Parameter(mean, requires_grad=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) → the same."""
        return pixels - self.pixel_mean


@torch.no_grad()
def fold_scale_(conv: nn.Conv2d, std: Tensor) -> None:
    """Make a convolution read 255·x instead of x/std, in place.

    Args:
        conv: reads (x − mean)/std, of pixels in 0..1.
        std: (1, 3, 1, 1).
    """
    conv.weight.copy_(conv.weight.double() / (255 * std.double()))


@torch.no_grad()
def fold_normalisation_(conv: nn.Conv2d, mean: Tensor, std: Tensor) -> None:
    """Make a convolution without padding read 0..255 pixels instead of normalised ones, in place.

    Args:
        conv: reads (x/255 − mean)/std.
        mean: (1, 3, 1, 1), of pixels in 0..1.
        std: (1, 3, 1, 1).
    """
    weight = conv.weight.double()
    bias = conv.bias.double() - (weight * (mean / std).double()).sum(dim=(1, 2, 3))  # type: ignore[union-attr]
    conv.weight.copy_(weight / (255 * std.double()))
    conv.bias.copy_(bias)  # type: ignore[union-attr]
