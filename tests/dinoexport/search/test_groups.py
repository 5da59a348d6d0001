"""Groups of layers, and the shortest names of mixtures of them."""

from dinoexport.recipes import PRECISIONS, parse_recipe
from dinoexport.search.groups import group_layers, group_of, raise_groups

LAYERS = [
    "patch_embed.proj",
    *(f"blocks.{i}.{part}" for i in range(12) for part in ("attn.q", "mlp.fc1", "mlp.fc2")),
    "head.members.0.mrd.1",
]
FP32, W8 = PRECISIONS["fp32"], PRECISIONS["w8"]


def test_a_group_is_a_half_of_a_block() -> None:
    assert group_of("blocks.5.mlp.fc1") == group_of("blocks.5.mlp.fc2") == "blocks.5.mlp"
    assert group_of("patch_embed.proj") == "patch_embed"
    assert group_of("head.members.0.mrd.1") == "head"
    assert group_of("net.layer3.2.conv1") == "net.layer3.2"


def test_groups_hold_each_layer_once() -> None:
    groups = group_layers(LAYERS)
    assert [layer for group in groups.values() for layer in group] == LAYERS
    assert list(groups)[:3] == ["patch_embed", "blocks.0.attn", "blocks.0.mlp"]


def test_a_mixture_fits_what_was_raised_and_nothing_else() -> None:
    raised = ["blocks.11.mlp", "head", "blocks.1.mlp", "blocks.1.attn"]
    recipe = raise_groups(FP32, raised, W8)
    assert recipe.name == "fp32:blocks.1+11.mlp=w8,head=w8,blocks.1.attn=w8"
    given = parse_recipe(recipe.name).assign(LAYERS)
    assert {layer for layer, p in given.items() if p is W8} == {
        layer for layer in LAYERS if group_of(layer) in raised
    }


def test_nothing_raised_is_the_base() -> None:
    assert raise_groups(W8, [], FP32).name == "w8"


def test_all_of_a_kind_are_one_star() -> None:
    groups = list(dict.fromkeys(map(group_of, LAYERS)))
    raised = [*(f"blocks.{i}.attn" for i in range(12)), "blocks.3.mlp", "head"]
    recipe = raise_groups(FP32, raised, W8, groups)
    assert recipe.name == "fp32:blocks.*.attn=w8,blocks.3.mlp=w8,head=w8"
    assert recipe.assign(LAYERS) == raise_groups(FP32, raised, W8).assign(LAYERS)


def test_three_in_a_row_are_spelled_by_their_ends() -> None:
    raised = [f"blocks.{i}.mlp" for i in (11, 0, 2, 1, 4, 5, 9, 10)]
    recipe = raise_groups(FP32, raised, W8)
    assert recipe.name == "fp32:blocks.0-2+4+5+9-11.mlp=w8"
    given = parse_recipe(recipe.name).assign(LAYERS)
    assert {layer for layer, p in given.items() if p is W8} == {
        layer for layer in LAYERS if group_of(layer) in raised
    }


def test_parts_that_are_no_numbers_are_spelled_out() -> None:
    recipe = raise_groups(FP32, ["net.layer2.0", "net.layer1.0"], W8)
    assert recipe.name == "fp32:net.layer1+layer2.0=w8"
