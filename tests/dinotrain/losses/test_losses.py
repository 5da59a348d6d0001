"""Losses by values worked out by hand, and their gradients."""

import math

import pytest
import torch

from dinotrain.errors import UsageError
from dinotrain.losses.bits import bce, bit_weights, focal, masked_mean
from dinotrain.losses.orthogonality import task_orthogonality
from dinotrain.losses.regression import mse

ALL = torch.ones(1, 1, dtype=torch.bool)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_bce_by_hand():
    logits = torch.tensor([[[[logit(0.8), logit(0.3)]]]])
    bits = torch.tensor([[[1.0, 0.0]]])
    wanted = -math.log(0.8) - math.log(0.7)
    assert bce(logits, bits, ALL).item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 2.0, 4.0, 6.0])
def test_focal_by_hand(gamma):
    logits = torch.tensor([[[[logit(0.8), logit(0.3)]]]])
    bits = torch.tensor([[[1.0, 0.0]]])
    wanted = -(0.2**gamma) * math.log(0.8) - 0.3**gamma * math.log(0.7)
    assert focal(logits, bits, ALL, gamma).item() == pytest.approx(wanted, rel=1e-5)


def test_focal_stays_finite_and_falls_at_extreme_logits():
    logits = torch.tensor([[[[200.0, -200.0]]]], requires_grad=True)
    loss = focal(logits, torch.tensor([[[0.0, 0.0]]]), ALL, 2.0)
    assert loss.item() == pytest.approx(200.0)
    loss.backward()
    assert bool(logits.grad.isfinite().all())
    assert logits.grad[0, 0, 0, 0] > 0


def test_bit_weights_fall_by_rho_and_have_mean_one():
    weights = bit_weights(3, 0.5)
    assert weights.tolist() == pytest.approx([12 / 7, 6 / 7, 3 / 7])
    assert bit_weights(8, 1.0).tolist() == [1.0] * 8
    logits = torch.tensor([[[[0.0, 0.0, 0.0]]]])
    loss = bce(logits, torch.zeros(1, 1, 3), ALL, weights)
    assert loss.item() == pytest.approx(3 * math.log(2))
    with pytest.raises(UsageError, match="ratio"):
        bit_weights(8, 0.0)


def test_masked_labels_do_not_count_and_get_no_gradient():
    logits = torch.zeros(2, 2, 3, 4, requires_grad=True)
    bits = torch.ones(2, 3, 4)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    loss = bce(logits, bits, mask)
    assert loss.item() == pytest.approx(4 * math.log(2))
    loss.backward()
    reached = logits.grad.abs().sum(dim=(1, 3)) > 0
    assert torch.equal(reached, mask)


def test_no_labels_at_all_is_zero_not_nan():
    logits = torch.zeros(2, 1, 1, 4, requires_grad=True)
    loss = bce(logits, torch.ones(2, 1, 4), torch.zeros(2, 1, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_masked_mean_averages_members_and_labels():
    values = torch.tensor([[[1.0, 5.0], [3.0, 7.0]]])
    mask = torch.tensor([[True, False]])
    assert masked_mean(values, mask).item() == 2.0


def test_mse_by_hand_with_nan_labels():
    logits = torch.tensor([[[[1.0], [0.0]]], [[[0.0], [2.0]]]], requires_grad=True)
    values = torch.tensor([[5.0, float("nan")], [float("nan"), 10.0]])
    loss = mse(logits, values, ~values.isnan(), torch.tensor([3.0, 12.0]), torch.tensor([2.0, 4.0]))
    # (1 − 1)² and (2 − (−0.5))², two labels.
    assert loss.item() == pytest.approx(6.25 / 2)
    loss.backward()
    assert bool(logits.grad.isfinite().all())


def test_orthogonality_by_hand():
    aligned = torch.tensor([[[2.0, 0.0]], [[5.0, 0.0]]])
    crossed = torch.tensor([[[2.0, 0.0]], [[0.0, 7.0]]])
    slanted = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, -1.0]]])
    assert task_orthogonality([aligned]).item() == pytest.approx(1.0)
    assert task_orthogonality([crossed]).item() == 0.0
    assert task_orthogonality([slanted]).item() == pytest.approx(0.5)
    assert task_orthogonality([aligned, crossed]).item() == pytest.approx(0.5)


def test_orthogonality_of_single_targets_is_zero():
    assert task_orthogonality([torch.randn(1, 8, 5)]).item() == 0.0
    assert task_orthogonality([]).item() == 0.0


def test_orthogonality_compares_every_pair():
    weights = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    total = 0.0
    for i in range(3):
        for j in range(3):
            if i != j:
                for a in weights[i]:
                    for b in weights[j]:
                        total += torch.cosine_similarity(a, b, dim=0).item() ** 2
    assert task_orthogonality([weights]).item() == pytest.approx(total / (6 * 16), rel=1e-5)
