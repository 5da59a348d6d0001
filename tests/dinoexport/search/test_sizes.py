"""Predicted sizes, against what quantised weights hold."""

import numpy as np
import pytest
from torch import nn

from dinoexport.quantize.weights import store_weight
from dinoexport.recipes import PRECISIONS
from dinoexport.search.sizes import group_sizes, layer_bytes

LAYERS = {
    "wide": nn.Linear(96, 40),
    "odd": nn.Linear(50, 24),
    "patches": nn.Conv2d(3, 32, 14),
    "pointwise": nn.Conv2d(64, 32, 1),
}
QUANTISED = [name for name, precision in PRECISIONS.items() if not precision.is_float]


@pytest.mark.parametrize("precision", QUANTISED)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_takes_its_codes_scales_and_tables(layer: str, precision: str) -> None:
    module = LAYERS[layer]
    stored = store_weight(module.weight.detach().numpy(), PRECISIONS[precision])
    held = stored.codes.size * stored.precision.bits / 8
    held += np.dtype(np.float16).itemsize * (stored.scale.size + stored.table.size)
    assert layer_bytes(module, PRECISIONS[precision]) == min(held, 2 * module.weight.numel())


def test_float_layers_take_their_own_width() -> None:
    count = LAYERS["wide"].weight.numel()
    assert layer_bytes(LAYERS["wide"], PRECISIONS["fp16"]) == 2 * count
    assert layer_bytes(LAYERS["wide"], PRECISIONS["fp32"]) == 4 * count


def test_a_group_has_the_weights_of_its_layers() -> None:
    model = nn.ModuleDict(
        {"blocks": nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleList(LAYERS.values())})])}
    )
    model["head"] = nn.Linear(7, 3)
    every = sum(layer.weight.numel() for layer in LAYERS.values())
    assert group_sizes(model, ["blocks.0.mlp", "head"]) == {"blocks.0.mlp": every, "head": 21}
