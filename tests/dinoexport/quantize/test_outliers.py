"""Outlier channels are found, and multiplied apart without changing the sum."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from dinoexport.quantize.calibration import TensorStatistics
from dinoexport.quantize.collect import calibrate
from dinoexport.quantize.layers import weighted_layers
from dinoexport.quantize.links import block_links
from dinoexport.quantize.outliers import MOST, SplitLinear, find_outliers, narrowed
from dinoexport.quantize.prepare import prepare_
from dinoexport.quantize.simulate import simulated
from dinoexport.quantize.smoothing import apply_
from dinoexport.recipes import parse_recipe


def statistics(low: list[float], high: list[float]) -> TensorStatistics:
    ends = np.array(low, np.float32), np.array(high, np.float32)
    return TensorStatistics((1, 4, len(low)), (-9, 9), min(low), max(high), *ends)


def test_outliers_reach_eight_times_as_far_as_the_median() -> None:
    seen = statistics([-1, -9, -0.5, 0, -1, 0, 0], [1, 2, 1, 7.9, 8.1, 1, 1])
    assert find_outliers(seen) == (1, 4)
    assert narrowed((-9, 9), seen, (1, 4)) == (-1, pytest.approx(7.9))
    assert narrowed((-0.7, 2), seen, (1, 4)) == (-0.7, 2)
    assert find_outliers(statistics([0] * 5, [0, 0, 0, 1, 9])) == ()


def test_at_most_a_few_are_split_off() -> None:
    peaks = [1.0] * 60 + [float(20 + i) for i in range(30)]
    assert find_outliers(statistics([0.0] * 90, peaks)) == tuple(range(90 - MOST, 90))


def test_a_split_layer_gives_the_same_sum() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 5).requires_grad_(False)
    whole, x = copy.deepcopy(linear), torch.randn(2, 3, 12)
    split = SplitLinear(linear, (2, 7))
    torch.testing.assert_close(split(x), whole(x))
    assert not split.normal.weight[:, [2, 7]].any()
    torch.testing.assert_close(split.outliers.pick(x), x[..., [2, 7]], rtol=0, atol=0)


def test_a_model_with_outliers_is_saved_by_it(deploy, pictures, outputs) -> None:
    exact = outputs(deploy, pictures)
    for link in block_links(deploy):
        factors = torch.ones(weighted_layers(deploy)[link.readers[0]].in_features)
        factors[5] = 1 / 128
        apply_(link, [weighted_layers(deploy)[name] for name in link.readers], factors)
    calibration = calibrate(deploy, pictures)

    def error(name: str) -> tuple[float, dict]:
        changed = copy.deepcopy(deploy)
        layers = prepare_(changed, parse_recipe(name), calibration)
        with simulated(changed, layers):
            return float((outputs(changed, pictures) - exact).square().mean().sqrt()), layers

    plain, _ = error("w8a8")
    saved, layers = error("w8a8:outliers")
    assert saved < plain / 2
    part = layers["blocks.1.mlp.fc1.outliers.mix"]
    assert part.precision.name == layers["blocks.1.mlp.fc1.outliers.pick"].precision.name == "fp16"
    assert part.input_range is None
    normal = layers["blocks.1.mlp.fc1.normal"]
    whole = calibration.layers["blocks.1.mlp.fc1"].input.range
    assert normal.precision.name == "w8a8"
    assert normal.input_range[1] - normal.input_range[0] < (whole[1] - whole[0]) / 8
