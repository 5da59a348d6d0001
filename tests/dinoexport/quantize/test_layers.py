"""Which layers there are, how they are called, and what a precision comes to for each."""

import pytest
from torch import nn

from dinoexport.passes.sequence import build_deploy_model
from dinoexport.quantize.layers import for_layer, quantises_activations, weighted_layers
from dinoexport.recipes import PRECISIONS


def test_layers_are_named_as_the_issue_has_it(deploy) -> None:
    names = list(weighted_layers(deploy))
    assert names[0] == "patch_embed.proj"
    assert {"blocks.1.attn.proj", "blocks.1.mlp.fc1", "head.members.0.mrd.1"} <= set(names)
    assert len(names) == len(set(names))


def test_only_linear_layers_of_blocks_have_integer_activations(deploy) -> None:
    for name, module in weighted_layers(deploy).items():
        inside = name.startswith("blocks.")
        assert quantises_activations(name, module) == inside, name
        assert for_layer(PRECISIONS["w8a8"], name, module).name == ("w8a8" if inside else "w8")
        assert for_layer(PRECISIONS["pal4"], name, module).name == "pal4"
    assert not quantises_activations("blocks.0.conv", nn.Conv2d(1, 1, 1))


def test_query_heads_have_layers_too(random_model) -> None:
    from dinotrain.heads.branch import HeadConfig
    from dinotrain.heads.pool import FeatureConfig

    model = random_model(head=HeadConfig(kind="query"), features=FeatureConfig(kind="tokens"))
    assert any(name.startswith("head.") for name in weighted_layers(build_deploy_model(model)))


@pytest.mark.parametrize("name", ["w8a8", "w8a8-dynamic", "w8a16"])
def test_without_integer_activations_the_weights_stay_the_same(name: str) -> None:
    assert PRECISIONS[name].weights_only().name == "w8"
