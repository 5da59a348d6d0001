"""Learning rates against torch's own schedulers."""

from pathlib import Path

import pytest
import torch

from dinotrain.schedule import rate_factor
from dinotrain.train_config import TrainConfig


def config(**fields) -> TrainConfig:
    fixed = {"data": Path("d"), "backbone": "b", "out": Path("o.safetensors"), "lr": 0.5}
    return TrainConfig(**fixed | fields)


def torchs(make, epochs: int) -> list[float]:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    scheduler = make(optimizer)
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def ours(recipe: TrainConfig) -> list[float]:
    return [recipe.lr * rate_factor(recipe, epoch) for epoch in range(recipe.epochs)]


def test_cosine():
    recipe = config(epochs=12, min_lr=0.01)
    wanted = torchs(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12, eta_min=0.01), 12)
    assert ours(recipe) == pytest.approx(wanted)


@pytest.mark.parametrize(("first", "period"), [(4, 4), (0, 10)], ids=["named", "a third"])
def test_warm_restarts(first, period):
    recipe = config(epochs=30, schedule="sgdr", restart_epochs=first, min_lr=1e-3)
    make = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts
    wanted = torchs(lambda o: make(o, T_0=period, T_mult=2, eta_min=1e-3), 30)
    assert ours(recipe) == pytest.approx(wanted)


def test_a_step_divides_by_ten_after_half():
    wanted = torchs(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [5], gamma=0.1), 10)
    assert ours(config(epochs=10, schedule="step")) == pytest.approx(wanted)


def test_warm_up_rises_in_a_line_and_then_the_schedule_begins():
    recipe = config(epochs=14, warmup_epochs=4)
    assert [rate_factor(recipe, e) for e in (0, 1, 2, 3, 3.5)] == [0, 0.25, 0.5, 0.75, 0.875]
    late = [rate_factor(recipe, 4 + e) for e in range(10)]
    assert late == pytest.approx([rate_factor(config(epochs=10), e) for e in range(10)])


def test_constant():
    assert set(ours(config(schedule="constant", epochs=3))) == {0.5}
