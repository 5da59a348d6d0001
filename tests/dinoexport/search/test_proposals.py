"""Mixtures that simulation proposes, against trying every number of raised groups."""

import pytest

from dinoexport.recipes import PRECISIONS, Recipe, parse_recipe
from dinoexport.search.groups import raise_groups
from dinoexport.search.proposals import SHARE, finer, ladder, propose_mixture

ONNX = ("fp32", "fp16", "w8", "w8a8-dynamic", "w8a8", "w8a16", "w4-block32")
COREML = ("fp32", "fp16", "w8", "w8a8", "w4-block32", "pal8", "pal6", "pal4")
NOISE = {f"blocks.{i}.{part}": 1.0 / (1 + i) for i in range(4) for part in ("attn", "mlp")}
W4, W8 = PRECISIONS["w4-block32"], PRECISIONS["w8"]


def drop_of(recipe: Recipe) -> float:
    """The noise of the groups that are not raised."""
    given = recipe.assign(NOISE)
    return sum(NOISE[name] for name, precision in given.items() if precision is W4)


def test_small_ones_come_first_and_integers_before_floats() -> None:
    assert [p.name for p in ladder(ONNX)] == ["w4-block32", "w8a8-dynamic", "w8a8", "w8"]
    assert [p.name for p in ladder(COREML)][:2] == ["w4-block32", "pal4"]


@pytest.mark.parametrize(
    ("base", "supported", "wanted"),
    [
        ("w8a8", ONNX, "w8"),
        ("w4-block32", ONNX, "w8"),
        ("w8", ONNX, "fp16"),
        ("pal4", COREML, "pal6"),
        ("w4-block32", COREML, "pal6"),
        ("pal6", COREML, "w8"),
        ("pal8", COREML, "fp16"),
    ],
)
def test_a_group_is_raised_to_the_next(base: str, supported, wanted: str) -> None:
    assert finer(PRECISIONS[base], supported).name == wanted


@pytest.mark.parametrize("budget", [0.5, 1.0, 2.0, 3.0, 4.9])
def test_as_few_groups_are_raised_as_hold(budget: float) -> None:
    order = sorted(NOISE, key=lambda group: -NOISE[group])
    fewest = next(
        n for n in range(len(order)) if drop_of(raise_groups(W4, order[:n], W8)) <= SHARE * budget
    )
    recipe = propose_mixture(W4, W8, NOISE, budget, drop_of)
    assert recipe == parse_recipe(raise_groups(W4, order[:fewest], W8).name)


def test_the_base_alone_where_it_holds() -> None:
    assert propose_mixture(W4, W8, NOISE, 100, drop_of).name == "w4-block32"


def test_nothing_where_no_mixture_holds() -> None:
    assert propose_mixture(W4, W8, NOISE, 0.01, drop_of) is None


def test_a_name_that_is_too_long_is_no_proposal() -> None:
    noise = {f"{part * 20}.{i}.x": 1.0 for i, part in enumerate("abcdefgh")}
    assert propose_mixture(W4, W8, noise, 1.0, lambda r: 8 - len(r.changes)) is None
