"""The deploy model computes what the training model computes, folded, cut and rounded."""

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from torch import Tensor, nn

from dinoexport.errors import BuildError
from dinoexport.graph.deploy_model import DeployModel
from dinoexport.passes.sequence import build_deploy_model
from dinoexport.quantize.prepare import prepare_
from dinoexport.recipes import parse_recipe
from dinotrain.backbones.vit import ViTConfig, swiglu_hidden_dim
from dinotrain.encoding import Encoding
from dinotrain.heads.branch import HeadConfig
from dinotrain.heads.pool import FeatureConfig

_SMALL = {"name": "small", "embed_dim": 48, "depth": 4, "heads": 3, "grid": (4, 4)}
PLAIN = ViTConfig(**_SMALL, ffn_dim=192, position_rule="scale")
REGISTERS = replace(PLAIN, registers=4, position_rule="size_antialias")
SWIGLU = replace(PLAIN, ffn="swiglu", ffn_dim=swiglu_hidden_dim(48), registers=2)
DEPLOY_BUDGET_MM = 1e-4
NAMES = ["mrd1_mm", "mrd2_mm", "lf_mm"]
STD_NAMES = ["mrd1_std_mm", "mrd2_std_mm", "lf_std_mm"]


def rounded_(deploy: DeployModel, recipe: str) -> DeployModel:
    """Prepare a deploy model for a recipe, by its name."""
    prepare_(deploy, parse_recipe(recipe))
    return deploy


# --- the deploy graph against the training model -------------------------------------------------

PYRAMID = FeatureConfig(kind="pyramid", taps=(0, 1, 2, 3))
VARIANTS = {
    "linear-plain": {"head": HeadConfig(kind="linear"), "encoding": Encoding(kind="plain")},
    "mlp-gray-registers": {"backbone": REGISTERS},
    "mlp-gray-24-bits": {"encoding": Encoding(bits=24)},
    "mlp-scalar": {"head": HeadConfig(hidden=16), "encoding": Encoding(kind="scalar")},
    "mlp-plain-hard": {"encoding": Encoding(kind="plain", decoding="hard")},
    "ensemble-gray-hard": {
        "head": HeadConfig(kind="ensemble", members=3, hidden=16),
        "encoding": Encoding(decoding="hard"),
    },
    "ensemble-scalar": {
        "head": HeadConfig(kind="ensemble", members=2, hidden=16),
        "encoding": Encoding(kind="scalar"),
    },
    "ensemble-swiglu-registers": {
        "backbone": SWIGLU,
        "head": HeadConfig(kind="ensemble", members=5, hidden=16),
    },
    "pyramid-final": {"features": PYRAMID},
    "pyramid-none-registers": {
        "backbone": REGISTERS,
        "features": replace(PYRAMID, tap_norm="none"),
    },
    "pyramid-own-ln-mixed-taps": {
        "backbone": SWIGLU,
        "features": FeatureConfig(kind="pyramid", taps=(2, 0, 1, 0), tap_norm="own_ln"),
    },
    "wide": {"image_size": (42, 84)},
    "high": {"image_size": (98, 28), "backbone": REGISTERS},
    "wide-pyramid": {"image_size": (42, 70), "features": PYRAMID},
    "other-mean-and-std": {"mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)},
    "other-epsilon": {"backbone": replace(PLAIN, layer_norm_eps=1e-3)},
}


def run_both(model, deploy: DeployModel, pixels: tuple[Tensor, ...]):
    """Outputs of the training model and of the deploy graph, each {name: (1,)}."""
    by_name = dict(zip(("primary", "up", "down"), pixels, strict=True))
    return model(by_name), dict(zip(deploy.output_names, deploy(*pixels), strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_deploy_graph_equals_the_training_model(random_model, random_pixels, variant):
    model = random_model(**VARIANTS[variant])
    deploy = build_deploy_model(model)
    assert deploy.output_names == NAMES + (STD_NAMES if "ensemble" in variant else [])
    rows = []
    for seed in range(3):
        wanted, found = run_both(model, deploy, random_pixels(seed, deploy.image_size))
        assert list(wanted) == deploy.output_names
        for name, value in found.items():
            assert value.shape == (1,)
            assert value.dtype == torch.float32
            # Random weights give values of some tens: 1e-5 of them is float32 rounding.
            torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=DEPLOY_BUDGET_MM)
        rows.append(torch.cat(list(wanted.values())))
    # Otherwise a constant would do as well.
    assert (torch.stack(rows).amax(0) - torch.stack(rows).amin(0)).max() > 100 * DEPLOY_BUDGET_MM


@pytest.mark.parametrize("rule", ["scale", "size", "size_antialias"])
@pytest.mark.parametrize("size", [(56, 56), (84, 84), (42, 42), (70, 42)], ids=str)
def test_position_is_baked_by_the_checkpoints_rule(random_model, random_pixels, rule, size):
    model = random_model(backbone=replace(REGISTERS, position_rule=rule), image_size=size)
    deploy = build_deploy_model(model)
    wanted, found = run_both(model, deploy, random_pixels(5, size))
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=DEPLOY_BUDGET_MM)
    patches = model.backbone.tokens(torch.zeros(1, 3, *size))[:, 5:]
    bare = model.backbone.patch_embed(torch.zeros(1, 3, *size))
    torch.testing.assert_close(deploy.backbone.position, patches - bare, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("side", "rules"),
    # Antialiasing acts only where the grid shrinks.
    [(84, ("scale", "size")), (42, ("size", "size_antialias"))],
    ids=["larger", "smaller"],
)
def test_another_rule_is_another_model(random_model, random_pixels, side, rules):
    """The comparison above tells the rules apart."""
    size = (side, side)
    wanted, other = (
        random_model(backbone=replace(REGISTERS, position_rule=rule), image_size=size)
        for rule in rules
    )
    outputs, found = run_both(wanted, build_deploy_model(other), random_pixels(5, size))
    assert any(float((found[n] - outputs[n]).abs()) > 10 * DEPLOY_BUDGET_MM for n in NAMES)


@pytest.mark.parametrize(
    "name",
    [
        "backbone.prefix",
        "backbone.position",
        "backbone.blocks.3.attn.proj.weight",
        "backbone.norm.bias",
        "head.members.0.lf.4.weight",
    ],
)
def test_a_wrong_weight_leaves_the_training_model(random_model, random_pixels, name):
    model = random_model()
    deploy = build_deploy_model(model)
    deploy.get_parameter(name).mul_(1.01)
    wanted, found = run_both(model, deploy, random_pixels(0, (56, 56)))
    assert any(float((found[n] - wanted[n]).abs()) > DEPLOY_BUDGET_MM for n in NAMES)


def test_dropout_is_off_even_while_training_goes_on(random_model, random_pixels):
    model = random_model(head=HeadConfig(dropout=0.9))
    pixels = random_pixels(0, (56, 56))
    wanted, _ = run_both(model, build_deploy_model(model), pixels)
    model.train().requires_grad_(True)
    deploy = build_deploy_model(model)
    assert not any(module.training for module in deploy.modules())
    assert not any(parameter.requires_grad for parameter in deploy.parameters())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    for value, name in zip(deploy(*pixels), NAMES, strict=True):
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=DEPLOY_BUDGET_MM)


def test_the_trained_model_is_not_changed(random_model, random_pixels):
    model = random_model(backbone=SWIGLU)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    deploy = rounded_(build_deploy_model(model), "fp16")
    deploy(*random_pixels(0, (56, 56)))
    for parameter in deploy.parameters():
        parameter.fill_(3.0)
    for buffer in deploy.buffers():
        buffer.fill_(3.0)
    after = model.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6, 1e-5}


# --- what is cut, and what is recorded -----------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "blocks"),
    [
        (FeatureConfig(), 4),
        (replace(PYRAMID, taps=(0, 1, 0, 1)), 2),
        (replace(PYRAMID, taps=(2, 0, 1, 0), tap_norm="own_ln"), 3),
        (replace(PYRAMID, taps=(0, 0, 0, 0), tap_norm="none"), 1),
    ],
    ids=["cls", "two", "three", "one"],
)
def test_blocks_after_the_last_read_are_dropped(random_model, random_pixels, features, blocks):
    model = random_model(features=features)
    pixels = random_pixels(1, (56, 56))
    wanted = model(dict(zip(("primary", "up", "down"), pixels, strict=True)))
    # What is not read may be anything.
    for block in model.backbone.blocks[blocks:]:
        for parameter in block.parameters():
            parameter.fill_(torch.nan)
    deploy = build_deploy_model(model, debug=True)
    assert len(deploy.backbone.blocks) == blocks
    halves = [f"blocks.{i}.{half}" for i in range(blocks) for half in ("attn", "mlp")]
    assert deploy.tap_names == ["tokens", *halves, "features"]
    for value, name in zip(deploy(*pixels)[:3], NAMES, strict=True):
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=DEPLOY_BUDGET_MM)


def test_taps_are_the_training_models_values(random_model, random_pixels):
    model = random_model(backbone=REGISTERS)
    deploy = build_deploy_model(model, debug=True)
    pixels = random_pixels(2, (56, 56))
    values = dict(zip(deploy.output_names + deploy.tap_names, deploy(*pixels), strict=True))
    stacked = model.normalise(torch.cat(pixels))
    x = model.backbone.tokens(stacked)
    wanted = {"tokens": x}
    for index, after in model.backbone.run_blocks(x):
        wanted[f"blocks.{index}.mlp"] = after
    (wanted["features"],) = model.extract(torch.cat(pixels))
    for name, value in wanted.items():
        # Normalisation folded or not: float32 rounding on values of some tens.
        torch.testing.assert_close(values[name], value, rtol=1e-5, atol=1e-4)
    # Behind the first half of a block only the attention has been added.
    block = model.backbone.blocks[1]
    half = block.attend(wanted["blocks.0.mlp"])
    torch.testing.assert_close(values["blocks.1.attn"], half, rtol=1e-5, atol=1e-4)
    assert not deploy.backbone.record, "taps of the last run are held in memory"


def test_debug_gives_the_same_outputs(random_model, random_pixels):
    model = random_model()
    pixels = random_pixels(3, (56, 56))
    plain, debug = (
        build_deploy_model(model)(*pixels),
        build_deploy_model(model, debug=True)(*pixels),
    )
    assert len(plain) == 3
    for first, second in zip(plain, debug[:3], strict=True):
        assert torch.equal(first, second)


def test_each_output_reads_its_own_inputs(random_model, random_pixels):
    """MRD reads primary gaze alone, LF reads up and down: METHODS B2."""
    deploy = build_deploy_model(random_model())
    primary, up, down = random_pixels(6, (56, 56))
    other = random_pixels(7, (56, 56))[0]
    first = torch.cat(deploy(primary, up, down))
    # The images run as one batch of three, so a change of one may change rounding in the others.
    close = {"rtol": 0, "atol": 1e-5}
    for pixels, same in (
        ((other, up, down), [2]),
        ((primary, other, down), [0, 1]),
        ((primary, up, other), [0, 1]),
        ((primary, down, up), [0, 1]),
    ):
        found = torch.cat(deploy(*pixels))
        torch.testing.assert_close(found[same], first[same], **close)
        changed = [i for i in range(3) if i not in same]
        assert ((found - first)[changed].abs() > 100 * DEPLOY_BUDGET_MM).all()


def test_the_batch_only_stacks_the_inputs(random_model, random_pixels):
    deploy = build_deploy_model(random_model(), debug=True)
    primary, up, down = random_pixels(8, (56, 56))
    features = deploy(primary, up, down)[-1]
    turned = deploy(down, primary, up)[-1]
    torch.testing.assert_close(turned, features[[2, 0, 1]], rtol=1e-5, atol=1e-5)
    alone = deploy(primary, primary, primary)[-1]
    for row in alone:
        torch.testing.assert_close(row, features[0], rtol=1e-5, atol=1e-5)


def test_output_names_follow_the_tasks_order(random_model):
    assert build_deploy_model(random_model()).output_names == NAMES
    ensemble = random_model(head=HeadConfig(kind="ensemble", members=2, hidden=16))
    assert build_deploy_model(ensemble).output_names == NAMES + STD_NAMES


# --- rounding ------------------------------------------------------------------------------------


def test_weights_are_rounded_to_half_and_the_decoder_is_not(random_model):
    model = random_model(backbone=REGISTERS, encoding=Encoding(kind="scalar"))
    model.decoder.mean.fill_(np.pi)
    exact, rounded = build_deploy_model(model), rounded_(build_deploy_model(model), "fp16")
    names = [name for name, _ in rounded.named_parameters()]
    assert names
    for name in names:
        value = rounded.get_parameter(name)
        half = exact.get_parameter(name).numpy().astype(np.float16)
        assert value.dtype == torch.float32
        np.testing.assert_array_equal(value.numpy(), half.astype(np.float32))
    assert any(not torch.equal(rounded.get_parameter(n), exact.get_parameter(n)) for n in names)
    buffers = dict(rounded.decoder.named_buffers())
    assert buffers.keys() == {"low", "span", "bit_weights", "mean", "std"}
    for name, value in exact.decoder.named_buffers():
        assert torch.equal(buffers[name], value), name
    assert float(buffers["mean"][0]) == float(np.float32(np.pi)) != float(np.float16(np.pi))


def test_bit_weights_of_24_bits_stay_exact(random_model):
    """Half precision has no 2^-25."""
    rounded = rounded_(build_deploy_model(random_model(encoding=Encoding(bits=24))), "fp16")
    assert rounded.decoder.bit_weights.tolist() == [0.5**bit for bit in range(1, 25)]


def test_epsilon_is_rounded_as_core_ml_stores_it(random_model):
    deploy = rounded_(build_deploy_model(random_model()), "fp16")
    found = {m.eps for m in deploy.modules() if isinstance(m, nn.LayerNorm)}
    assert found == {float(np.float16(1e-6)), float(np.float16(1e-5))}
    assert found != {1e-6, 1e-5}


def test_single_precision_changes_nothing(random_model):
    model = random_model()
    deploy = build_deploy_model(model)
    before = {name: value.clone() for name, value in deploy.state_dict().items()}
    assert rounded_(deploy, "fp32") is deploy
    assert all(torch.equal(before[n], v) for n, v in deploy.state_dict().items())
    assert {m.eps for m in deploy.modules() if isinstance(m, nn.LayerNorm)} == {1e-6, 1e-5}


# 65504 is the largest half; from 65520, halfway to the next, rounding gives infinity.
@pytest.mark.parametrize("value", [65504.0, 65519.0, -65519.0])
def test_the_largest_weights_that_fit(random_model, value):
    deploy = build_deploy_model(random_model())
    deploy.get_parameter("backbone.blocks.1.mlp.fc1.weight")[2, 3] = value
    rounded_(deploy, "fp16")
    found = float(deploy.get_parameter("backbone.blocks.1.mlp.fc1.weight")[2, 3])
    assert found == float(np.sign(value)) * 65504


@pytest.mark.parametrize("value", [65520.0, -7e4, float("inf")])
def test_a_weight_that_overflows_is_refused_by_name(random_model, value):
    deploy = build_deploy_model(random_model())
    deploy.get_parameter("backbone.blocks.1.mlp.fc1.weight")[2, 3] = value
    with pytest.raises(BuildError, match=r"blocks\.1\.mlp\.fc1\.weight holds") as caught:
        rounded_(deploy, "fp16")
    text = str(caught.value)
    assert f"{abs(value):.3g}" in text
    assert "65504" in text
    assert text.endswith("Build with --precision fp32.")
    assert "\n" not in text
    # In full precision it may be built.
    assert rounded_(deploy, "fp32") is deploy


def test_a_product_of_folding_that_overflows_is_refused(random_model):
    """Neither factor is too large for half precision; their product is."""
    model = random_model()
    model.backbone.blocks[2].norm1.weight.fill_(1000.0)
    model.backbone.blocks[2].attn.qkv.weight[0, 0] = 1000.0
    with pytest.raises(BuildError, match=r"blocks\.2\.attn\.q\.weight holds 2\.5e\+05"):
        rounded_(build_deploy_model(model), "fp16")
