"""Smoothing keeps the function to the bit, and takes outliers out of activations."""

import copy

import pytest
import torch

from dinoexport.errors import BuildError
from dinoexport.graph.capture import capture_deploy
from dinoexport.passes.sequence import PASSES, build_deploy_model
from dinoexport.passes.split_qkv import SplitQkv
from dinoexport.quantize import links
from dinoexport.quantize.collect import calibrate
from dinoexport.quantize.layers import weighted_layers
from dinoexport.quantize.links import block_links
from dinoexport.quantize.prepare import assign_layers, prepare_
from dinoexport.quantize.simulate import simulated
from dinoexport.quantize.smoothing import apply_, balance, smooth_
from dinoexport.recipes import parse_recipe
from dinotrain.backbones.vit import ViTConfig

SWIGLU = ViTConfig(
    name="swiglu",
    embed_dim=48,
    depth=2,
    heads=2,
    ffn="swiglu",
    ffn_dim=64,
    grid=(4, 4),
    position_rule="scale",
)


def planted(model):
    """Give what both LayerNorms of a block give, values and hidden units outlier channels."""
    for link in block_links(model):
        factors = torch.ones(weighted_layers(model)[link.readers[0]].in_features)
        factors[torch.tensor([3, 11])] = 1 / 64
        apply_(link, [weighted_layers(model)[name] for name in link.readers], factors)
    return model


@pytest.fixture(params=["split-gelu", "qkv-gelu", "swiglu"])
def model(request, tiny_checkpoint, random_model, deploy):
    if request.param == "split-gelu":
        return deploy
    if request.param == "swiglu":
        return build_deploy_model(random_model(backbone=SWIGLU))
    joined = PASSES[: [type(p) for p in PASSES].index(SplitQkv)]
    return build_deploy_model(random_model(), joined)


def test_every_link_keeps_the_function(model, pictures, outputs) -> None:
    wanted = outputs(model, pictures)
    found = block_links(model)
    assert len(found) == 4 * len(model.backbone.blocks)
    generator = torch.Generator().manual_seed(1)
    for link in found:
        readers = [weighted_layers(model)[name] for name in link.readers]
        exponents = torch.randint(-4, 5, (readers[0].in_features,), generator=generator)
        apply_(link, readers, torch.exp2(exponents.float()))
    # Powers of two: not one bit of any product changes, but a sum may run in another order.
    torch.testing.assert_close(outputs(model, pictures), wanted, rtol=1e-5, atol=1e-5)


def test_factors_that_are_not_folded_back_are_caught(
    deploy, pictures, outputs, monkeypatch
) -> None:
    """The check above sees the fault that it is there for."""
    wanted = outputs(deploy, pictures)
    monkeypatch.setattr(links, "_divide_norm", lambda norm: lambda factor: None)
    link = block_links(deploy)[0]
    readers = [weighted_layers(deploy)[name] for name in link.readers]
    apply_(link, readers, torch.exp2(torch.arange(64) % 3))
    assert (outputs(deploy, pictures) - wanted).abs().max() > 1e-3


def test_smoothing_changes_nothing_at_fp32_and_saves_int8(model, pictures, outputs) -> None:
    exact = outputs(model, pictures)
    planted(model)
    calibration = calibrate(model, pictures)
    recipe = parse_recipe("w8a8")
    smoothed = copy.deepcopy(model)
    done = smooth_(smoothed, calibration, assign_layers(model, recipe))
    assert done and all(item.error_after < item.error_before for item in done)
    torch.testing.assert_close(outputs(smoothed, pictures), exact, rtol=1e-5, atol=1e-5)

    def error(name: str) -> float:
        changed = copy.deepcopy(model)
        layers = prepare_(changed, parse_recipe(name), calibration)
        with simulated(changed, layers):
            return float((outputs(changed, pictures) - exact).square().mean().sqrt())

    assert error("w8a8:smooth") < error("w8a8") / 2


def test_smoothed_activations_have_no_outliers_left(deploy, pictures) -> None:
    calibration = calibrate(planted(deploy), pictures)
    smooth_(deploy, calibration, assign_layers(deploy, parse_recipe("w8a8")))
    after = calibrate(deploy, pictures)
    for name in ("blocks.1.attn.q", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"):
        before, now = calibration.layers[name].input, after.layers[name].input
        assert now.peak_ratio < before.peak_ratio / 3, name


def test_layers_with_float_activations_are_left(deploy, calibration) -> None:
    before = copy.deepcopy(deploy.state_dict())
    assert smooth_(deploy, calibration, assign_layers(deploy, parse_recipe("w8"))) == []
    done = smooth_(deploy, calibration, assign_layers(deploy, parse_recipe("w8a8:blocks.0=fp16")))
    assert all(item.link.startswith("blocks.1") for item in done)
    for name, value in deploy.state_dict().items():
        if "blocks.1" not in name:
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_factors_are_the_rule_of_the_source_in_powers_of_two() -> None:
    peaks = torch.tensor([1.0, 100.0, 0.5, 0.0, 3.0])
    weights = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.0])
    factors = balance(peaks, weights, 0.5)
    rule = (peaks[:3] / weights[:3]) ** 0.5
    ratio = factors[:3] / (rule / rule.median())
    assert bool(((ratio > 0.7) & (ratio < 1.42)).all())
    assert factors[3] == factors[4] == 1  # dead channels
    assert torch.equal(torch.exp2(factors.log2().round()), factors)
    assert torch.equal(balance(peaks, weights * 0, 0.5), torch.ones(5))


def test_a_smoothed_model_is_captured(deploy, calibration) -> None:
    recipe = parse_recipe("w8a8:smooth,outliers,bias")
    layers = prepare_(deploy, recipe, calibration)
    assert capture_deploy(deploy, recipe, layers).layers.keys() == layers.keys()


def test_modifiers_want_calibration(deploy) -> None:
    with pytest.raises(BuildError, match="needs calibration"):
        prepare_(deploy, parse_recipe("w8a8-dynamic:smooth"))
