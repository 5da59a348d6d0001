"""What is folded inside a block, and its split qkv, against the formula in float64."""

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from torch import Tensor, nn

from dinoexport.graph.deploy_blocks import DeployBlock, PlainAttention, SplitAttention
from dinoexport.passes.fold_attention_scale import fold_attention_scale_
from dinoexport.passes.fold_layer_norms import fold_layer_norms_
from dinoexport.passes.fold_layer_scale import fold_layer_scale_
from dinotrain.backbones.vit import Block, ViTConfig, swiglu_hidden_dim

_SMALL = {"name": "small", "embed_dim": 48, "depth": 4, "heads": 3, "grid": (4, 4)}
PLAIN = ViTConfig(**_SMALL, ffn_dim=192, position_rule="scale")
SWIGLU = replace(PLAIN, ffn="swiglu", ffn_dim=swiglu_hidden_dim(48), registers=2)


def fold(block: Block) -> DeployBlock:
    """A copy of a block behind all passes that change it."""
    folded = DeployBlock(block)
    folded.attn = attention = PlainAttention(SplitAttention(block.attn))
    fold_layer_norms_(folded)
    fold_layer_scale_(folded)
    fold_attention_scale_(attention)
    return folded


def norm64(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / (variance + norm.eps).sqrt() * norm.weight.double() + norm.bias.double()


def linear64(x: Tensor, layer: nn.Linear) -> Tensor:
    return x @ layer.weight.double().T + layer.bias.double()


def block_formula(block: Block, x: Tensor) -> Tensor:
    """x + ls1·attn(norm1 x), then x + ls2·mlp(norm2 x), written out in float64 (METHODS A1)."""
    heads = block.attn.heads
    batch, tokens, dim = x.shape
    q, k, v = (
        part.reshape(batch, tokens, heads, dim // heads).permute(0, 2, 1, 3)
        for part in linear64(norm64(x, block.norm1), block.attn.qkv).split(dim, dim=-1)
    )
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / (dim // heads) ** 0.5
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    mixed = torch.einsum("bhij,bhjd->bihd", weights, v).reshape(batch, tokens, dim)
    x = x + block.ls1.gamma.double() * linear64(mixed, block.attn.proj)
    read = norm64(x, block.norm2)
    if hasattr(block.mlp, "fc1"):
        inner = linear64(read, block.mlp.fc1)
        inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
        out = linear64(inner, block.mlp.fc2)
    else:
        gate, value = linear64(read, block.mlp.w12).split(block.mlp.w3.in_features, dim=-1)
        out = linear64(gate / (1 + (-gate).exp()) * value, block.mlp.w3)
    return x + block.ls2.gamma.double() * out


def random_block(config: ViTConfig, dtype: torch.dtype) -> Block:
    torch.manual_seed(4)
    block = Block(config).to(dtype).requires_grad_(False)
    for parameter in block.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return block


@pytest.mark.parametrize("config", [PLAIN, SWIGLU], ids=["mlp", "swiglu"])
def test_scales_are_folded_exactly(config):
    """In float64, where nothing but the algebra can err."""
    block = random_block(config, torch.float64)
    x = torch.randn(2, 9, 48, dtype=torch.float64)
    wanted = block_formula(block, x)
    folded = fold(block)
    # A few hundred roundings of 1e-16 on values of some ten.
    torch.testing.assert_close(folded(x), wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))


@pytest.mark.parametrize("config", [PLAIN, SWIGLU], ids=["mlp", "swiglu"])
def test_scales_are_folded_up_to_rounding_in_float32(config):
    block = random_block(config, torch.float32)
    x = torch.randn(2, 9, 48, dtype=torch.float64)
    wanted = block_formula(block, x)
    folded = fold(block)
    noise = ((folded.double()(x) - wanted) ** 2).sum() / (wanted**2).sum()
    # Each folded weight is rounded twice (multiply, multiply): about 2^-24, −144 dB; a matrix
    # product with a bias rounds more often.
    assert 10 * np.log10(float(noise)) < -130


@pytest.mark.parametrize("config", [PLAIN, SWIGLU], ids=["mlp", "swiglu"])
@pytest.mark.parametrize("name", ["norm1.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"])
def test_a_scale_that_is_left_out_shows(config, name):
    block = random_block(config, torch.float64)
    x = torch.randn(2, 9, 48, dtype=torch.float64)
    wanted = block_formula(block, x)
    parameter = block.get_parameter(name)
    parameter.mul_(1.0001)
    folded = fold(block)
    assert float((folded(x) - wanted).abs().max()) > 1e-6


@pytest.mark.parametrize("config", [PLAIN, SWIGLU], ids=["mlp", "swiglu"])
def test_folding_leaves_no_scale_and_keeps_epsilon(config):
    block = random_block(replace(config, layer_norm_eps=3e-5), torch.float32)
    folded = fold(block)
    names = [name for name, _ in folded.named_parameters()]
    assert len(names) == 12
    assert not [name for name in names if "norm" in name or "ls" in name]
    assert folded.norm1.eps == folded.norm2.eps == 3e-5
