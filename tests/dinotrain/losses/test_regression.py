"""Scalar losses by hand, and against slow formulas and torch's own."""

import math

import pytest
import torch
from torch import nn

from dinotrain.errors import ShapeError, UsageError
from dinotrain.heads.gaussian import MIN_VARIANCE
from dinotrain.losses.regression import focal_r, gaussian_nll, mse

MEAN, STD = torch.tensor([3.0, 12.0]), torch.tensor([2.0, 4.0])
ONE = (torch.zeros(1), torch.ones(1))
ALL = torch.ones(1, 1, dtype=torch.bool)


@pytest.fixture
def batch():
    """Return (5, 3, 2, 2) outputs, labels with gaps, and where they are."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, 2, 2, generator=draw)
    values = torch.randn(5, 2, generator=draw) * STD + MEAN
    values[0, 1] = values[3, 0] = float("nan")
    return logits, values, ~values.isnan()


def labelled(logits, values, mask):
    """Give (outputs, z-score of the label) one by one."""
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            if mask[i, j]:
                z = (values[i, j].item() - MEAN[j].item()) / STD[j].item()
                for member in range(logits.shape[1]):
                    yield logits[i, member, j].double().tolist(), z


def test_focal_r_by_hand():
    # e = 2: σ(0.4)² · 4.
    found = focal_r(torch.full((1, 1, 1, 1), 2.0), torch.zeros(1, 1), ALL, *ONE, gamma=2.0)
    assert found.item() == pytest.approx(4 / (1 + math.exp(-0.4)) ** 2)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 3.0])
def test_focal_r_one_by_one(batch, gamma):
    logits, values, mask = batch
    terms = []
    for (guess, _), z in labelled(*batch):
        error = guess - z
        terms.append(error**2 * (1 / (1 + math.exp(-0.7 * abs(error)))) ** gamma)
    found = focal_r(logits[..., :1], values, mask, MEAN, STD, gamma=gamma, beta=0.7)
    assert found.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_focal_r_without_gamma_is_mse(batch):
    logits, values, mask = batch
    arguments = (logits[..., :1], values, mask, MEAN, STD)
    assert torch.equal(focal_r(*arguments, gamma=0.0), mse(*arguments))


def test_focal_r_refuses_to_favour_large_errors():
    with pytest.raises(UsageError, match="γ -1"):
        focal_r(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1), ALL, *ONE, gamma=-1.0)


def test_gaussian_nll_by_hand():
    # μ 1, σ² 4, y 3: ½ (log 4 + 4/4).
    logits = torch.tensor([1.0, math.log(4.0)]).reshape(1, 1, 1, 2)
    found = gaussian_nll(logits, torch.full((1, 1), 3.0), ALL, *ONE)
    assert found.item() == pytest.approx(0.5 * (math.log(4) + 1), rel=1e-6)


def test_gaussian_nll_one_by_one(batch):
    logits, values, mask = batch
    terms = []
    for (guess, log_variance), z in labelled(*batch):
        density = torch.distributions.Normal(guess, math.exp(log_variance / 2))
        terms.append(-density.log_prob(torch.tensor(z)).item() - 0.5 * math.log(2 * math.pi))
    found = gaussian_nll(logits, values, mask, MEAN, STD)
    # The floor of the variance, 1e-6, stands against variances of e^−2 and above.
    assert found.item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_gaussian_nll_is_torchs(batch):
    logits, values, mask = batch
    z = ((values - MEAN) / STD)[mask]
    guess, variance = logits[:, 1, :, 0][mask], logits[:, 1, :, 1][mask].exp() + MIN_VARIANCE
    wanted = nn.GaussianNLLLoss()(guess, z, variance)
    found = gaussian_nll(logits[:, 1:2], values, mask, MEAN, STD)
    torch.testing.assert_close(found, wanted)


def test_gaussian_nll_stays_finite_where_a_member_is_sure():
    logits = torch.tensor([0.0, -200.0]).reshape(1, 1, 1, 2).requires_grad_()
    loss = gaussian_nll(logits, torch.ones(1, 1), ALL, *ONE)
    loss.backward()
    assert bool(loss.isfinite())
    assert bool(logits.grad.isfinite().all())


def test_gaussian_nll_learns_mean_and_variance():
    draw = torch.randn(500, 1, generator=torch.Generator().manual_seed(1)) * 3 + 5
    logits = torch.zeros(1, 1, 1, 2, requires_grad=True)
    mask = torch.ones_like(draw, dtype=torch.bool)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(600):
        optimizer.zero_grad()
        gaussian_nll(logits.expand(500, 1, 1, 2), draw, mask, *ONE).backward()
        optimizer.step()
    mean, log_variance = logits.flatten().tolist()
    # The optimum is the sample's own mean and variance.
    assert mean == pytest.approx(draw.mean().item(), abs=1e-2)
    assert math.exp(log_variance) == pytest.approx(draw.var(unbiased=False).item(), rel=1e-2)


@pytest.mark.parametrize("loss", [focal_r, gaussian_nll])
def test_masked_labels_give_no_gradient(batch, loss):
    logits, values, mask = batch
    logits = logits.clone().requires_grad_()
    loss(logits if loss is gaussian_nll else logits[..., :1], values, mask, MEAN, STD).backward()
    assert bool(logits.grad.isfinite().all())
    assert torch.equal(logits.grad.abs().sum(dim=(1, 3)) > 0, mask)


def test_a_scalar_head_is_no_gaussian_member():
    with pytest.raises(ShapeError, match="1 numbers per target"):
        gaussian_nll(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1), ALL, *ONE)
