"""Names of recipes: what can be said, what it means, and what is refused."""

import pytest

from dinoexport.recipes import (
    MAX_NAME,
    PRECISIONS,
    Activations,
    nearest,
    parse_recipe,
)
from dinotrain.errors import UsageError

LAYERS = [
    "patch_embed.proj",
    "blocks.1.attn.q",
    "blocks.1.mlp.fc1",
    "blocks.1.mlp.fc2",
    "blocks.10.mlp.fc1",
    "head.members.0.mrd.1",
]


@pytest.mark.parametrize("name", PRECISIONS)
def test_every_precision_is_a_recipe(name: str) -> None:
    recipe = parse_recipe(name)
    assert recipe.name == name and recipe.precisions == (PRECISIONS[name],)
    assert recipe.assign(LAYERS) == dict.fromkeys(LAYERS, PRECISIONS[name])
    assert recipe.is_float == (name in ("fp32", "fp16"))
    assert recipe.calibrated == (name in ("w8a8", "w8a16"))


@pytest.mark.parametrize(
    "name",
    ["w8:blocks.5.mlp=fp16", "w8a8:smooth,outliers,bias,blocks.*.mlp.fc2=w8,blocks.1=fp32"],
)
def test_a_name_reads_back_as_itself(name: str) -> None:
    assert parse_recipe(name).name == name
    assert parse_recipe(parse_recipe(name).name) == parse_recipe(name)


def test_modifiers_have_one_order_and_count_once() -> None:
    assert parse_recipe("w8a8:bias,smooth,bias").name == "w8a8:smooth,bias"
    assert parse_recipe("w8a8-dynamic:smooth").calibrated


def test_a_pattern_fits_the_first_parts_of_a_name() -> None:
    def changed(pattern: str) -> list[str]:
        assigned = parse_recipe(f"w8:{pattern}=pal4").assign(LAYERS)
        return [layer for layer, precision in assigned.items() if precision.name == "pal4"]

    assert changed("blocks.1") == LAYERS[1:4]  # and not block 10
    assert changed("blocks.1.mlp") == LAYERS[2:4]
    assert changed("blocks.*.mlp.fc1") == [LAYERS[2], LAYERS[4]]
    assert changed("blocks.1*") == LAYERS[1:5]
    assert changed("blocks.0-1") == LAYERS[1:4]  # and not block 10
    assert changed("blocks.2-10.mlp") == LAYERS[4:5]
    assert changed("head") == LAYERS[5:]


def test_the_last_change_that_fits_holds() -> None:
    assigned = parse_recipe("w8:blocks=fp16,blocks.1.mlp=pal6,blocks.*.mlp.fc2=fp32").assign(LAYERS)
    assert [p.name for p in assigned.values()] == ["w8", "fp16", "pal6", "fp32", "fp16", "w8"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w8a9", r"unknown precision 'w8a9'\. Did you mean 'w8a"),
        ("", "unknown precision ''"),
        ("w8a8:smoth", "'smoth' is neither one of smooth, outliers, bias nor LAYER=PRECISION"),
        ("w8a8:", "'' is neither"),
        ("w8:blocks.5..mlp=fp16", "neither"),
        ("w8:Blocks=fp16", "neither"),
        ("w8:../x=fp16", "neither"),
        ("w8:blocks.5=", "unknown precision ''"),
        ("w8:smooth", "smooth is for quantised activations"),
        ("fp16:bias,blocks.1=w8", "bias is for quantised activations"),
        ("w8:" + ",".join(f"blocks.{i}.mlp=fp16" for i in range(12)), f"{MAX_NAME} do"),
    ],
)
def test_what_cannot_be_meant_is_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_recipe(name)


def test_a_layer_that_is_not_there_is_named() -> None:
    with pytest.raises(
        UsageError, match=r"no layer .* called 'blocks\.7'; its layers are patch_em"
    ):
        parse_recipe("w8:blocks.7=fp16").assign(LAYERS)


@pytest.mark.parametrize(
    ("name", "supported", "wanted"),
    [
        ("w8a16", ["fp32", "fp16", "w8", "w8a8"], "w8"),
        ("w8a8-dynamic", ["fp16", "w8", "w8a8"], "w8a8"),
        ("pal8", ["fp16", "w8", "w4-block32"], "w8"),
        ("pal4", ["fp16", "w8", "w4-block32"], "w4-block32"),
        ("fp16", ["fp32", "w8"], "w8"),
    ],
)
def test_the_nearest_has_weights_of_as_many_bits(name, supported, wanted) -> None:
    assert nearest(PRECISIONS[name], supported) == wanted


def test_weights_only_keeps_the_weights() -> None:
    for precision in PRECISIONS.values():
        alone = precision.weights_only()
        assert alone.activations is Activations.FLOAT
        assert (alone.kind, alone.bits, alone.block) == (
            precision.kind,
            precision.bits,
            precision.block,
        )
