"""The Pareto front against a plain comparison of all pairs, the choice, and how they are shown."""

import itertools
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from dinoexport.search.front import Candidate, choose, draw_front, front_table, pareto_front


def candidate(recipe: str, size: int, error: float, latency: float | None = None) -> Candidate:
    return Candidate(recipe=recipe, size_bytes=size, sha256="", error=error, latency_ms=latency)


SMALL = candidate("pal4", 2_000_000, 0.3, 9.0)
FAST = candidate("w8a8", 3_500_000, 0.08, 4.0)
EXACT = candidate("fp16", 6_500_000, 0.001, 10.0)
POOR = candidate("w8", 6_600_000, 0.4, 11.0)
ALL = [EXACT, POOR, SMALL, FAST]


def test_the_front_is_what_nothing_beats() -> None:
    assert pareto_front(ALL) == [SMALL, FAST, EXACT]


@pytest.mark.parametrize("seed", range(5))
def test_the_front_against_all_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    some = [
        candidate(str(i), int(s), float(e), float(t))
        for i, (s, e, t) in enumerate(rng.integers(1, 5, (12, 3)))
    ]
    front = pareto_front(some)
    assert front
    for one, other in itertools.product(some, some):
        better = (
            other.size_bytes <= one.size_bytes
            and other.error <= one.error
            and other.latency_ms <= one.latency_ms
            and (other.size_bytes, other.error, other.latency_ms)
            != (one.size_bytes, one.error, one.latency_ms)
        )
        if better:
            assert one not in front
    for one in some:
        if one not in front:
            assert any(f.size_bytes <= one.size_bytes and f.error <= one.error for f in front), one


def test_the_smallest_or_the_fastest_within_the_budget() -> None:
    assert choose(ALL, 0.5, "size") is SMALL
    assert choose(ALL, 0.1, "size") is FAST
    assert choose(ALL, 0.5, "speed") is FAST
    assert choose(ALL, 0.01, "speed") is EXACT
    assert choose(ALL, 0.0001, "size") is None
    assert choose([], 1, "size") is None


def test_without_latencies_size_and_error_count() -> None:
    some = [candidate("a", 2, 0.1), candidate("b", 2, 0.2), candidate("c", 1, 0.3)]
    assert [c.recipe for c in pareto_front(some)] == ["c", "a"]
    assert choose(some, 1, "size").recipe == "c"


def test_the_table_marks_front_choice_and_what_is_over() -> None:
    lines = front_table(ALL, 0.1, "mm", FAST)
    assert "error mm" in lines[0]
    by_recipe = {line.split()[1] if line[2] in ">*" else line.split()[0]: line for line in lines}
    assert by_recipe["w8a8"].startswith("  > ")
    assert by_recipe["fp16"].startswith("  * ")
    assert by_recipe["w8"].startswith("    ")
    assert by_recipe["pal4"].endswith("over 0.1")
    assert "over" not in by_recipe["w8a8"]
    assert " - " in front_table([candidate("a", 1, 0.1)], 1, "mm", None)[1]


def test_the_drawing_is_the_same_twice_and_names_each() -> None:
    drawn = draw_front(ALL, 0.1, "mm", FAST, "eyes for onnx")
    assert drawn == draw_front(ALL, 0.1, "mm", FAST, "eyes for onnx")
    ElementTree.fromstring(drawn)
    for one in ALL:
        assert f"{one.recipe}, ".encode() in drawn
    assert b"budget 0.1 mm" in drawn


def test_an_error_of_nothing_can_be_drawn() -> None:
    exact = [candidate("a", 1, 0.0), candidate("b", 2, 0.0)]
    ElementTree.fromstring(draw_front(exact, 0.01, "of pictures", exact[0], "t"))
