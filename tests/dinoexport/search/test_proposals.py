"""Mixtures that simulation proposes, against trying every number of raised groups."""

from collections.abc import Callable

import pytest

from dinoexport.recipes import PRECISIONS, Recipe, parse_recipe
from dinoexport.search.groups import raise_groups
from dinoexport.search.proposals import finer, ladder, propose_mixture

ONNX = ("fp32", "fp16", "w8", "w8a8-dynamic", "w8a8", "w8a16", "w4-block32")
COREML = ("fp32", "fp16", "w8", "w8a8", "w4-block32", "pal8", "pal6", "pal4")
NOISE = {f"blocks.{i}.{part}": 1.0 / (1 + i) for i in range(4) for part in ("attn", "mlp")}
W4, W8 = PRECISIONS["w4-block32"], PRECISIONS["w8"]


def drop_in(noise: dict[str, float]) -> Callable[[Recipe], float]:
    """The noise of the groups that are not raised."""
    return lambda recipe: sum(noise[name] for name, p in recipe.assign(noise).items() if p is W4)


drop_of = drop_in(NOISE)


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


@pytest.mark.parametrize("limit", [0.4, 0.8, 1.6, 2.4, 3.9])
def test_as_few_groups_are_raised_as_hold(limit: float) -> None:
    order = sorted(NOISE, key=lambda group: -NOISE[group])
    fewest = next(n for n in range(len(order)) if drop_of(raise_groups(W4, order[:n], W8)) <= limit)
    recipe = propose_mixture(W4, W8, NOISE, limit, drop_of)
    assert recipe == parse_recipe(raise_groups(W4, order[:fewest], W8, order).name)


def test_the_base_alone_where_it_holds() -> None:
    assert propose_mixture(W4, W8, NOISE, 100, drop_of).name == "w4-block32"


def test_nothing_where_no_mixture_holds() -> None:
    assert propose_mixture(W4, W8, NOISE, 0.01, drop_of) is None


def test_a_name_that_is_too_long_becomes_shorter_where_more_is_raised() -> None:
    even = [n for n in range(80) if n % 2 == 0]
    noise = {f"blocks.{n}.x": 2.0 if n in even else 1.0 for n in range(80)} | {"head": 0.1}
    # The even ones would do, and are 40 numbers, which no file's name can hold.
    recipe = propose_mixture(W4, W8, noise, 40.2, drop_in(noise))
    assert recipe is not None
    assert recipe == parse_recipe(recipe.name)
    raised = {group for group, precision in recipe.assign(noise).items() if precision is W8}
    assert {f"blocks.{n}.x" for n in even} < raised


def test_where_no_name_fits_there_is_no_proposal() -> None:
    noise = {f"{part * 20}.{i}.x": 1.0 for i, part in enumerate("abcdefgh")}
    assert propose_mixture(W4, W8, noise, 1.0, lambda r: 8 - len(r.changes)) is None
