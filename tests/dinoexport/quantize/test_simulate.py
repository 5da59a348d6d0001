"""Rounding of activations against plain formulas."""

import dataclasses

import numpy as np
import pytest
import torch

from dinoexport.errors import BuildError
from dinoexport.quantize.layers import Layer
from dinoexport.quantize.prepare import prepare_
from dinoexport.quantize.simulate import (
    input_rounding,
    round_dynamic,
    round_int8,
    round_int16,
    simulated,
)
from dinoexport.recipes import PRECISIONS, parse_recipe


@pytest.mark.parametrize("limits", [(-1.0, 3.0), (0.0, 2.0), (-4.0, 0.0), (-0.001, 0.0009)])
def test_int8_is_the_nearest_of_256_steps(limits) -> None:
    x = np.linspace(1.5 * limits[0] - 1e-4, 1.5 * limits[1] + 1e-4, 1001).astype(np.float32)
    got = round_int8(torch.from_numpy(x), limits).numpy()
    scale = (limits[1] - limits[0]) / 255
    zero = round(-limits[0] / scale)
    grid = (np.arange(256) - zero) * scale
    wanted = grid[np.abs(x[:, None] - grid).argmin(axis=1)]
    np.testing.assert_allclose(np.abs(got - x), np.abs(wanted - x), atol=2e-6 * np.ptp(limits))
    assert float(round_int8(torch.zeros(1), limits)) == 0


def test_int16_is_symmetric() -> None:
    x = torch.linspace(-3, 3, 501)
    got = round_int16(x, (-1.0, 2.0))
    assert (got - x.clamp(-2, 2)).abs().max() <= 1.01 / 32767
    torch.testing.assert_close(got, -got.flip(0))


def test_dynamic_ranges_are_each_pictures_own() -> None:
    x = torch.randn(3, 5, 7) * torch.tensor([1.0, 50.0, 0.0])[:, None, None]
    got = round_dynamic(x)
    for picture, rounded in zip(x, got, strict=True):
        ends = min(float(picture.min()), 0.0), max(float(picture.max()), 1e-30)
        torch.testing.assert_close(rounded, round_int8(picture, ends), rtol=1e-5, atol=1e-6)


def test_float_activations_stay(deploy, calibration, pictures, outputs) -> None:
    layers = prepare_(deploy, parse_recipe("w8"))
    wanted = outputs(deploy, pictures)
    with simulated(deploy, layers):
        assert torch.equal(outputs(deploy, pictures), wanted)


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-dynamic", "w8a16"])
def test_rounding_holds_only_inside(recipe, deploy, calibration, pictures, outputs) -> None:
    layers = prepare_(deploy, parse_recipe(recipe), calibration)
    wanted = outputs(deploy, pictures)
    with simulated(deploy, layers):
        inside = outputs(deploy, pictures)
    with simulated(deploy, layers, outputs=True):
        both = outputs(deploy, pictures)
    assert not torch.equal(inside, wanted)
    # Formats of dynamic ranges give floats.
    assert torch.equal(inside, both) == (recipe == "w8a8-dynamic")
    torch.testing.assert_close(outputs(deploy, pictures), wanted, rtol=0, atol=0)


def test_a_layer_without_its_range_is_refused() -> None:
    layer = Layer("blocks.0.mlp.fc1", PRECISIONS["w8a8"])
    with pytest.raises(BuildError, match="has no range"):
        input_rounding(layer)
    assert input_rounding(dataclasses.replace(layer, input_range=(-1.0, 1.0)))
