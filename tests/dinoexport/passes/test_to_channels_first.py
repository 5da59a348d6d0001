"""Columns for the Neural Engine: the same function and taps, chunks of equal size."""

import pytest
import torch
from msgspec.structs import replace
from torch import nn

from dinoexport.errors import PassError
from dinoexport.graph import deploy_channels
from dinoexport.graph.capture import capture, export
from dinoexport.graph.deploy_blocks import PlainAttention, SplitAttention
from dinoexport.graph.deploy_channels import ChannelAttention, convolution
from dinoexport.graph.deploy_model import DeployModel
from dinoexport.graph.deploy_norms import ChannelNorm
from dinoexport.passes.base import apply_passes
from dinoexport.passes.guard_norms import GuardNorms
from dinoexport.passes.sequence import LAYOUTS, PASSES, build_deploy_model
from dinoexport.passes.to_channels_first import ToChannelsFirst
from dinoexport.verify.reference import as_rows
from dinotrain.backbones.vit import Attention, ViTConfig, swiglu_hidden_dim
from dinotrain.heads.pool import FeatureConfig

SIZE = (42, 56)
VIT = ViTConfig(
    name="small", embed_dim=48, depth=2, heads=3, ffn_dim=96, grid=(4, 4), position_rule="scale"
)
CASES = {
    "mean": {"backbone": replace(VIT, registers=4)},
    "cls": {"backbone": VIT, "features": FeatureConfig(kind="cls")},
    "swiglu-maps": {
        "backbone": replace(VIT, ffn="swiglu", ffn_dim=swiglu_hidden_dim(48)),
        "features": FeatureConfig(kind="pyramid", taps=(0, 1, 0, 1), tap_norm="none"),
    },
}
ANE = (*PASSES, *LAYOUTS["ane"])


@pytest.mark.parametrize("chunk", [5, 512])
@pytest.mark.parametrize("case", CASES)
def test_it_preserves_the_function_and_the_taps(
    random_model, random_pixels, monkeypatch, case, chunk
):
    """In float64; of chunks of 5 the last one is filled with zeros."""
    monkeypatch.setattr(deploy_channels, "CHUNK", chunk)
    model = random_model(**{"image_size": SIZE} | CASES[case])
    pixels = tuple(x.double() for x in random_pixels(0, SIZE))
    rows, columns = (build_deploy_model(model, passes).double() for passes in (PASSES, ANE))
    wanted, wanted_taps = rows.run(pixels)
    found, found_taps = columns.run(pixels)
    # Sums in another order: a few hundred roundings of 1e-16 on values of some ten.
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-11)
    assert list(found_taps) == list(wanted_taps)
    for name, value in wanted_taps.items():
        torch.testing.assert_close(as_rows(name, found_taps[name]), value, rtol=0, atol=1e-11)


def test_all_of_it_are_columns_of_four_dimensions(random_model):
    program = capture(random_model(backbone=VIT, image_size=SIZE), "fp32", ANE).program
    values = {n.name: n.meta["val"] for n in program.graph.nodes if "val" in n.meta}
    counts = [str(n.target) for n in program.graph.nodes]
    # The patch embedding and six layers of each block; what is left is the head's.
    assert counts.count("aten.conv2d.default") == 1 + 6 * 2
    assert counts.count("aten.linear.default") == 4
    assert max(value.ndim for value in values.values()) == 4


def test_layers_keep_their_names(random_model):
    deploy = build_deploy_model(random_model(backbone=VIT, image_size=SIZE), ANE)
    rows = build_deploy_model(random_model(backbone=VIT, image_size=SIZE))
    weights = {n for n, _ in rows.named_parameters() if n.startswith("backbone.")}
    assert {n for n, _ in deploy.named_parameters() if n.startswith("backbone.")} == weights
    conv = deploy.get_submodule("backbone.blocks.1.mlp.fc1")
    linear = rows.get_submodule("backbone.blocks.1.mlp.fc1")
    assert torch.equal(conv.weight[:, :, 0, 0], linear.weight)


@pytest.mark.parametrize("count", [1, 5, 7, 10, 11])
def test_chunks_are_equal_and_hold_every_query(monkeypatch, count):
    monkeypatch.setattr(deploy_channels, "CHUNK", 5)
    torch.manual_seed(0)
    plain = PlainAttention(SplitAttention(Attention(12, 2))).double()
    plain.scale = 1.0
    turned = ChannelAttention(plain)
    x = torch.randn(2, count, 12, dtype=torch.float64)
    seen: list[tuple[int, ...]] = []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(
        torch.Tensor, "softmax", lambda x, dim: (seen.append(tuple(x.shape)), softmax(x, dim))[1]
    )
    found = turned(x.transpose(1, 2).unsqueeze(2))
    assert len(set(seen)) == 1
    assert len(seen) == -(-count // 5)
    assert seen[0][2] <= 5
    wanted = plain(x).transpose(1, 2).unsqueeze(2)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)


def test_a_convolution_is_the_linear_layer():
    linear = nn.Linear(6, 4).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    found = convolution(linear)(x.transpose(1, 2).unsqueeze(2))
    torch.testing.assert_close(found[:, :, 0].transpose(1, 2), linear(x), rtol=0, atol=1e-14)


def test_norms_run_over_channels(random_model):
    deploy = build_deploy_model(random_model(backbone=VIT, image_size=SIZE), ANE)
    norm = deploy.blocks[0].norm1
    assert type(norm) is ChannelNorm
    x = torch.randn(1, 48, 1, 5, dtype=torch.float64)
    wanted = nn.functional.layer_norm(x.transpose(1, 3), (48,), eps=norm.eps).transpose(1, 3)
    torch.testing.assert_close(norm(x), wanted, rtol=0, atol=1e-13)


def test_it_comes_last(random_model):
    model = random_model(backbone=VIT, image_size=SIZE)
    with pytest.raises(PassError, match=r"^pass to_channels_first requires that"):
        apply_passes(DeployModel(model), [ToChannelsFirst()])
    deploy = build_deploy_model(model, ANE)
    with pytest.raises(PassError, match="pass guard_norms requires that tokens are rows"):
        apply_passes(deploy, [GuardNorms()])


def test_taps_add_no_node(random_model):
    model = random_model(**{"image_size": SIZE} | CASES["cls"])
    deploy = build_deploy_model(model, ANE)
    plain = [node.name for node in export(deploy).graph.nodes]
    deploy.debug = True
    assert plain == [node.name for node in export(deploy).graph.nodes]


def test_rows_are_made_of_a_vits_taps_alone():
    """A ConvNet's map one pixel high is a map."""
    x = torch.randn(2, 6, 1, 5)
    assert torch.equal(as_rows("blocks.0.attn", x), x[:, :, 0].transpose(1, 2))
    assert as_rows("tokens", x.numpy()).shape == (2, 5, 6)
    assert as_rows("tokens", x[:, :, 0]).shape == (2, 6, 5)
    for name in ("stages.0.1", "stem", "logits", "features"):
        assert as_rows(name, x) is x
