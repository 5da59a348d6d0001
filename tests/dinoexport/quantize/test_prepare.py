"""A prepared model holds the numbers that its layers say, and nothing else changed."""

import copy

import pytest
import torch
from torch import nn

from dinoexport.errors import BuildError
from dinoexport.quantize.layers import weighted_layers
from dinoexport.quantize.prepare import prepare_
from dinoexport.recipes import PRECISIONS, parse_recipe
from dinotrain.errors import UsageError

MIXTURE = "w8a8:patch_embed=fp32,blocks.0.attn=fp16,blocks.1.mlp=pal4,head=w4-block32"


@pytest.mark.parametrize("name", [*PRECISIONS, MIXTURE, "w8a8:smooth,bias"])
def test_weights_are_those_that_ship(name: str, deploy, calibration) -> None:
    before = copy.deepcopy(deploy)
    layers = prepare_(deploy, parse_recipe(name), calibration)
    modules, old = weighted_layers(deploy), weighted_layers(before)
    assert list(layers) == list(modules)
    assigned = parse_recipe(name).assign(modules)
    for key, layer in layers.items():
        weight = modules[key].weight
        if layer.stored is not None:
            assert torch.equal(weight, torch.from_numpy(layer.stored.values())), key
            assert layer.precision.bits == assigned[key].bits
        elif layer.precision.name == "fp16":
            assert torch.equal(weight, old[key].weight.half().float()), key
        else:
            assert torch.equal(weight, old[key].weight), key
        assert (layer.input_range is not None) == layer.precision.calibrated, key


@pytest.mark.parametrize("name", ["fp16", "w8", MIXTURE])
def test_the_rest_is_half_precision(name: str, deploy, calibration) -> None:
    prepare_(deploy, parse_recipe(name), calibration)
    weights = {id(m.weight) for m in weighted_layers(deploy).values()}
    for key, parameter in deploy.named_parameters():
        if id(parameter) not in weights:
            assert torch.equal(parameter, parameter.half().float()), key
    epsilons = {m.eps for m in deploy.modules() if isinstance(m, nn.LayerNorm)}
    assert epsilons == {float(torch.tensor(1e-6).half()), float(torch.tensor(1e-5).half())}


def test_fp32_keeps_every_bit(deploy) -> None:
    before = copy.deepcopy(deploy.state_dict())
    layers = prepare_(deploy, parse_recipe("fp32"))
    for key, value in deploy.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(layer.stored is None for layer in layers.values())


def test_ranges_are_those_of_calibration(deploy, calibration) -> None:
    layers = prepare_(deploy, parse_recipe("w8a8:blocks.1.mlp.fc2=w8a16"), calibration)
    fc1, fc2 = layers["blocks.1.mlp.fc1"], layers["blocks.1.mlp.fc2"]
    assert fc1.input_range == calibration.layers["blocks.1.mlp.fc1"].input.range
    assert fc1.output_range == calibration.layers["blocks.1.mlp.fc1"].output.range
    peak = calibration.layers["blocks.1.mlp.fc2"].input.peak
    assert fc2.input_range == (-peak, peak)


def test_what_cannot_be_prepared_is_refused(deploy, calibration) -> None:
    with pytest.raises(UsageError, match=r"no layer of this model is called 'blocks\.9'"):
        prepare_(deploy, parse_recipe("w8:blocks.9=fp16"))
    with pytest.raises(BuildError, match="w8a8 needs calibration"):
        prepare_(deploy, parse_recipe("w8a8"))
    with pytest.raises(BuildError, match=r"w8a16: this model has no layer .* Use w8\."):
        prepare_(deploy, parse_recipe("w8:patch_embed=w8a16"), calibration)


def test_weights_that_no_format_holds_are_refused(deploy) -> None:
    weighted_layers(deploy)["blocks.0.mlp.fc1"].weight[0, 0] = 1e5
    with pytest.raises(BuildError, match="half precision ends at 65504"):
        prepare_(deploy, parse_recipe("fp16"))
    weighted_layers(deploy)["blocks.0.mlp.fc1"].weight[0, 0] = float("nan")
    with pytest.raises(BuildError, match=r"blocks\.0\.mlp.fc1 holds weights that are not finite"):
        prepare_(deploy, parse_recipe("w8"))
