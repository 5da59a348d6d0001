"""Mean and std in the patch convolution, against the formula in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoexport.passes.fold_normalisation import fold_normalisation_
from dinotrain.model import IMAGENET_MEAN, IMAGENET_STD


def colour(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).reshape(1, 3, 1, 1)


def patch_convolution(dtype: torch.dtype) -> nn.Conv2d:
    torch.manual_seed(1)
    return nn.Conv2d(3, 24, 14, 14).to(dtype).requires_grad_(False)


def unfolded(conv: nn.Conv2d, pixels: Tensor) -> Tensor:
    mean = colour(IMAGENET_MEAN).double()
    std = colour(IMAGENET_STD).double()
    normalised = (pixels.double() / 255 - mean) / std
    return F.conv2d(normalised, conv.weight.double(), conv.bias.double(), stride=14)


def folding_error(conv: nn.Conv2d, mean: Tensor, std: Tensor) -> float:
    """Largest error of the folded convolution, in units of what rounding its weights explains."""
    pixels = torch.randint(0, 256, (2, 3, 42, 70), generator=torch.Generator().manual_seed(2))
    wanted = unfolded(conv, pixels)
    folded = copy.deepcopy(conv)
    fold_normalisation_(folded, mean, std)
    weight, bias = folded.weight.double(), folded.bias.double()
    found = F.conv2d(pixels.double(), weight, bias, stride=14)
    # Weight, bias and mean/std are each rounded to float32 once: half a unit in the last place.
    shift = (conv.weight.double() * (mean / std).double()).abs().sum(dim=(1, 2, 3))
    most = F.conv2d(pixels.double(), weight.abs(), bias.abs() + shift, stride=14) * 2**-24
    return float(((found - wanted).abs() / most).max())


def test_normalisation_is_folded_up_to_rounding():
    conv = patch_convolution(torch.float32)
    assert folding_error(conv, colour(IMAGENET_MEAN), colour(IMAGENET_STD)) <= 1


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (IMAGENET_MEAN[::-1], IMAGENET_STD),
        (IMAGENET_MEAN, IMAGENET_STD[::-1]),
        (IMAGENET_MEAN, (0.229, 0.224, 0.22501)),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ],
    ids=["mean-reversed", "std-reversed", "std-nearly", "halves"],
)
def test_a_wrong_normalisation_is_more_than_rounding(mean, std):
    conv = patch_convolution(torch.float32)
    assert folding_error(conv, colour(mean), colour(std)) > 3


def test_a_picture_of_the_mean_colour_leaves_the_bias():
    conv = patch_convolution(torch.float64)
    bias = conv.bias.clone()
    fold_normalisation_(conv, colour(IMAGENET_MEAN).double(), colour(IMAGENET_STD).double())
    pixels = 255 * colour(IMAGENET_MEAN).double().expand(1, 3, 14, 14)
    torch.testing.assert_close(conv(pixels).reshape(-1), bias, rtol=0, atol=1e-13)
