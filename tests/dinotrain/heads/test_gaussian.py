"""Gaussian members: their mixture against sampling and plain formulas."""

import math

import pytest
import torch

from dinotrain.errors import ShapeError
from dinotrain.heads.gaussian import mix, split_members


def test_mixture_by_hand():
    # N(1, 1) and N(3, 3): mean 2, variance ((1 + 1) + (3 + 9)) / 2 − 4 = 3.
    mean, variance = mix(torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[1.0], [3.0]]]))
    assert (mean.item(), variance.item()) == (2.0, 3.0)


def test_mixture_by_the_other_formula():
    draw = torch.Generator().manual_seed(0)
    means = torch.randn(7, 5, 3, generator=draw)
    variances = torch.rand(7, 5, 3, generator=draw) + 0.1
    mean, variance = mix(means, variances)
    mu, var = means.double(), variances.double()
    wanted = (var + mu**2).mean(dim=1) - mu.mean(dim=1) ** 2
    torch.testing.assert_close(mean.double(), mu.mean(dim=1), atol=1e-6, rtol=0)
    torch.testing.assert_close(variance.double(), wanted, atol=1e-6, rtol=1e-6)


def test_mixture_is_what_its_samples_show():
    logits = torch.tensor([[0.0, math.log(0.25)], [2.0, 0.0], [-1.0, math.log(4.0)]])
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(200_000, 3, generator=draw, dtype=torch.float64)
    members = logits[:, 0] + normal * (logits[:, 1] / 2).exp()
    mean, variance = mix(*split_members(logits.reshape(1, 3, 1, 2)))
    # 600,000 samples: standard errors of 0.0023 and of 0.5 %.
    assert mean.item() == pytest.approx(members.mean().item(), abs=0.012)
    assert variance.item() == pytest.approx(members.var().item(), rel=0.02)


def test_a_far_mean_costs_the_variance_no_digits():
    means = torch.full((1, 5, 1), 1000.0)
    _, variance = mix(means, torch.full((1, 5, 1), 1e-4))
    # mean(σ² + μ²) − μ̄² is 0 or 0.0625 in float32.
    assert variance.item() == pytest.approx(1e-4, rel=1e-6)


def test_another_width_is_refused():
    with pytest.raises(ShapeError, match="8 numbers per target"):
        split_members(torch.zeros(1, 1, 1, 8))
