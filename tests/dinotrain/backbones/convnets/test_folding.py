"""Folding of BatchNorm: the same outputs, and no normalisation left."""

import pytest
import torch

from dinotrain.backbones.convnets.config import CONVNETS
from dinotrain.backbones.convnets.folding import fold_batch_norms
from dinotrain.backbones.convnets.layers import BatchNorm
from dinotrain.backbones.convnets.table import build_convnet
from dinotrain.errors import UsageError

TOLERANCE = 1e-10
"""Both sides in float64, relative to a map's spread; measured: 1e-14."""


def outputs(model: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        out, taps = model.forward_taps(images)
    return [out.features, out.pooled, *taps]


def gap(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max() / b.std()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("size", [(64, 64), (65, 96)], ids=str)
def test_folded_equals_unfolded(small, randomised, size):
    model = randomised(small).double()
    images = torch.randn(2, 3, *size).double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wanted = outputs(model, images)
    folded = fold_batch_norms(model)

    assert gap(outputs(folded, images), wanted) <= TOLERANCE
    assert not any(isinstance(module, BatchNorm) for module in folded.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_every_normalisation_of_the_published_models_has_its_convolution():
    for name in ("seresnet50", "efficientnet_b2"):
        with torch.device("meta"):
            folded = fold_batch_norms(build_convnet(CONVNETS[name]))

        assert not any("running" in key for key in folded.state_dict())


def test_comparison_catches_a_planted_fault(small, randomised):
    model = randomised(small).double()
    images = torch.randn(2, 3, 64, 64).double()
    wanted = outputs(model, images)
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    norms[-2].eps *= 1.01

    assert gap(outputs(fold_batch_norms(model), images), wanted) > 10 * TOLERANCE


def test_live_or_folded_models_are_refused(small, randomised):
    model = randomised(small)
    with pytest.raises(UsageError, match="folded before"):
        fold_batch_norms(fold_batch_norms(model))
    model.set_live_statistics_(True)
    with pytest.raises(UsageError, match="live BatchNorm"):
        fold_batch_norms(model)
