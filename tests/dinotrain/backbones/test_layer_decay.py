"""Learning rates by layer, against the rule written out by name as DINOv2 has it."""

import re

import pytest
import torch
from torch import nn

from dinotrain.backbones.convnets.config import CONVNETS
from dinotrain.backbones.convnets.table import build_convnet
from dinotrain.backbones.layer_decay import block_count, parameter_depths, parameter_groups
from dinotrain.backbones.vit import VARIANTS, VisionTransformer
from dinotrain.errors import UsageError


def meta(name: str) -> nn.Module:
    with torch.device("meta"):
        if name in VARIANTS:
            return VisionTransformer(VARIANTS[name])
        return build_convnet(CONVNETS[name])


def depth_by_name(name: str, starts: tuple[int, ...], blocks: int) -> int:
    """Tell a parameter's depth from its name; ``starts`` counts the blocks before each stage."""
    if match := re.match(r"(?:layer|blocks\.)(\d+)\.(?:(\d+)\.)?", name):
        stage = int(match[1])
        if name.startswith("layer"):
            return starts[stage - 1] + int(match[2]) + 1
        # A transformer's blocks have one number.
        return stage + 1 if len(starts) == 1 else starts[stage] + int(match[2]) + 1
    after = name.startswith(("norm.", "conv_head.", "bn2."))
    return blocks + 1 if after else 0


STARTS = {
    "dinov2_vits14_reg": ((0,), 12),
    "dinov2_vitg14": ((0,), 40),
    "seresnet50": ((0, 3, 7, 13), 16),
    "efficientnet_b0": ((0, 1, 3, 5, 8, 11, 15), 16),
}


@pytest.mark.parametrize("name", list(STARTS))
def test_depths_equal_those_told_by_names(name):
    model = meta(name)
    starts, blocks = STARTS[name]
    depths = parameter_depths(model)

    assert block_count(model) == blocks
    assert depths == {
        key: depth_by_name(key, starts, blocks) for key, _ in model.named_parameters()
    }


def test_what_stands_before_a_transformers_blocks():
    depths = parameter_depths(meta("dinov2_vits14_reg"))

    assert {name for name, depth in depths.items() if depth == 0} == {
        "cls_token",
        "pos_embed",
        "register_tokens",
        "mask_token",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
    }


@pytest.mark.parametrize("name", list(STARTS))
def test_groups_hold_every_parameter_once_with_its_rate(name):
    model = meta(name)
    groups = parameter_groups(model, lr=1e-3, layer_decay=0.5, weight_decay=0.04)
    depths = parameter_depths(model)
    rates = {id(value): group["lr"] for group in groups for value in group["params"]}
    decays = {id(value): group["weight_decay"] for group in groups for value in group["params"]}

    assert sum(len(group["params"]) for group in groups) == len(depths)
    assert all(group["params"] for group in groups)
    for key, value in model.named_parameters():
        assert rates[id(value)] == 1e-3 * 0.5 ** (STARTS[name][1] + 1 - depths[key])
        one_dimensional = key.endswith(".bias") or "norm" in key or "gamma" in key
        one_dimensional |= bool(re.search(r"(bn\d|downsample\.1)\.", key))
        assert decays[id(value)] == (0.0 if one_dimensional else 0.04)
    assert [group["lr"] for group in groups] == sorted(group["lr"] for group in groups)


def test_rates_by_hand():
    model = meta("dinov2_vits14")
    groups = parameter_groups(model, lr=1.0, layer_decay=0.9)
    rates = {id(value): group["lr"] for group in groups for value in group["params"]}

    assert rates[id(model.norm.weight)] == 1.0
    assert rates[id(model.blocks[11].attn.qkv.weight)] == 0.9
    assert rates[id(model.cls_token)] == pytest.approx(0.9**13)
    assert {group["lr"] for group in parameter_groups(model, lr=1e-5)} == {1e-5}


def test_frozen_parameters_are_left_out():
    model = meta("efficientnet_b0").requires_grad_(False)
    assert parameter_groups(model, lr=1e-3) == []
    model.conv_head.weight.requires_grad_(True)
    (group,) = parameter_groups(model, lr=1e-3, layer_decay=0.9, weight_decay=0.1)

    assert group["params"] == [model.conv_head.weight]
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.1)


def test_groups_are_what_an_optimiser_takes(tiny_backbone):
    from dinotrain.backbones.weights import load_backbone

    model = load_backbone(tiny_backbone).requires_grad_(True)
    optimiser = torch.optim.AdamW(parameter_groups(model, lr=1e-3, layer_decay=0.5))
    tokens = model(torch.randn(1, 3, 28, 28)).patch_tokens
    # Their plain sum is the same for all weights, as a LayerNorm is last: its gradient is rounding.
    (tokens * torch.randn_like(tokens)).sum().backward()
    before = [value.detach().clone() for value in model.blocks.parameters()]
    optimiser.step()

    # Adam's first step is the learning rate, whatever the gradient.
    moved = [
        float((value - old).abs().max())
        for value, old in zip(model.blocks.parameters(), before, strict=True)
    ]
    per_block = len(moved) // 4
    for block in range(4):
        part = moved[block * per_block : (block + 1) * per_block]
        assert max(part) == pytest.approx(1e-3 * 0.5 ** (4 - block), rel=0.05)


@pytest.mark.parametrize("decay", [0.0, 1.1, -0.5, float("nan")])
def test_decay_outside_its_range_is_refused(decay):
    with pytest.raises(UsageError, match="layer decay"):
        parameter_groups(meta("seresnet50"), lr=1e-3, layer_decay=decay)
