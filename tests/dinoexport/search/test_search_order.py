"""Which recipes a search builds, and which it leaves out: no model, figures by hand."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from dinoexport.cli.budget import _show
from dinoexport.console import Reporter
from dinoexport.errors import BuildError
from dinoexport.recipes import Recipe, parse_recipe
from dinoexport.search import search as module
from dinoexport.search.front import Candidate
from dinoexport.search.search import Search, SearchRequest
from dinoexport.search.state import SearchState
from dinoexport.targets.onnx import OnnxTarget

NOISE = {"blocks.0.attn": 4.0, "blocks.0.mlp": 3.0, "head": 2.0, "patch_embed": 1.0}
ONE, TWO = "w4-block32:blocks.0.attn=w8", "w4-block32:blocks.0.attn=w8,blocks.0.mlp=w8"
FIGURES = {
    # recipe: (bytes, error of the artifact, drop in simulation)
    "fp16": (600, 0.001, 0.001),
    "w4-block32": (200, 0.3, 0.3),
    ONE: (220, 0.09, 0.07),
    TWO: (250, 0.05, 0.05),
    "w8a8": (310, 0.08, 0.095),
    "w8a8-dynamic": (310, 0.08, 0.095),
    "w8": (300, 0.02, 0.02),
}


class Handmade(Search):
    """A search whose simulations and artifacts are figures."""

    def __init__(self, budget: float, prefer: str, figures: dict) -> None:
        self.request = SearchRequest(budget, prefer)  # type: ignore[arg-type]
        self.reporter = Reporter(enabled=False)
        self.held_out = SimpleNamespace(samples=(), source="hand")
        self._known, self._deploy = {}, None
        self._state = SearchState(key="")
        self._path = Path("nowhere")
        self.figures, self.built, self.sensed = figures, [], []
        self.log, self.in_turns, self.alone_ms = Path(os.devnull), [], {}

    def _keep(self) -> None: ...

    def _applies(self, base) -> bool:
        return True

    def _size(self, recipe: Recipe, measured) -> float:
        return self.figures.get(recipe.name, (400,))[0]

    def _drop(self, recipe: Recipe) -> float:
        return self.figures.get(recipe.name, (0, 0, 0.0))[2]

    def _sensitivity(self, base) -> dict[str, float]:
        self.sensed.append(base.name)
        return NOISE

    def _measure(self, target, recipe: Recipe) -> Candidate:
        size, error, _ = self.figures[recipe.name]
        self.built.append(recipe.name)
        latency_ms = self.alone_ms.get(recipe.name, 1.0)
        return Candidate(
            recipe=recipe.name, size_bytes=size, sha256="", error=error, latency_ms=latency_ms
        )

    def _lower(self, target, recipe: Recipe, folder: Path) -> Path:
        return folder / recipe.name

    def _time(self, runtimes) -> list[float]:
        self.in_turns.append(runtimes)
        return [0.9 if name == "w8a8" else 1.1 for name in runtimes]


@pytest.fixture
def search(monkeypatch):
    names = [name for name in FIGURES if ":" not in name]
    monkeypatch.setattr(OnnxTarget, "supports", {n: OnnxTarget.supports[n] for n in names})
    monkeypatch.setattr(module, "group_sizes", lambda _model, groups: dict.fromkeys(groups, 1))

    monkeypatch.setattr(OnnxTarget, "runtime", lambda _self, path: path.name)

    def run(
        budget: float = 0.1,
        prefer: str = "size",
        alone_ms: dict[str, float] | None = None,
        **changed: tuple[int, float, float],
    ):
        made = Handmade(budget, prefer, FIGURES | changed)
        made.alone_ms = alone_ms or {}
        return made, made.run("onnx")

    return run


def test_what_is_larger_and_no_more_exact_is_not_built(search) -> None:
    made, result = search()
    assert made.built == ["fp16", "w4-block32", ONE, "w8"]
    assert result.chosen.recipe == ONE
    why = f"larger and no more exact than {ONE}"
    assert result.skipped == {"w8a8": why, "w8a8-dynamic": why}
    # Nor is it asked which layers of what is larger could be raised.
    assert made.sensed == ["w4-block32"]
    # What an earlier search has built is shown, whatever this one would have done.
    assert made.run("onnx").skipped.keys() == result.skipped.keys()
    made._state.targets["onnx"].candidates["w8a8"] = made._measure(None, parse_recipe("w8a8"))
    assert made.run("onnx").skipped.keys() == {"w8a8-dynamic"}


def test_a_mixture_that_does_not_hold_is_followed_by_a_more_careful_one(search) -> None:
    made, result = search(**{ONE: (220, 0.11, 0.07)})
    assert made.built[:4] == ["fp16", "w4-block32", ONE, TWO]
    assert result.chosen.recipe == TWO


def test_where_simulation_sees_no_loss_more_is_raised_all_the_same(search) -> None:
    made, result = search(**{"w4-block32": (200, 0.3, 0.0), TWO: (250, 0.05, 0.0)})
    assert made.built[:3] == ["fp16", "w4-block32", TWO]
    assert result.chosen.recipe == TWO


def test_a_precision_that_holds_alone_needs_no_mixture(search) -> None:
    made, result = search(budget=0.4)
    assert (result.chosen.recipe, made.sensed) == ("w4-block32", [])


def test_where_speed_is_asked_for_every_precision_is_built(search) -> None:
    made, result = search(prefer="speed")
    assert {name for name in made.figures if ":" not in name} <= set(made.built)
    assert result.skipped == {}


def test_the_fastest_are_timed_in_turns_before_one_is_chosen(search) -> None:
    # As on a host that was slow while w8a8 was built.
    alone_ms = {"w8a8": 1.2, "w8": 1.6, "w4-block32": 0.1}
    made, result = search(prefer="speed", alone_ms=alone_ms)
    (timed,) = made.in_turns
    # Neither what is far behind nor what does not hold the budget is built again.
    assert "w8a8" in timed and not {"w8", "w4-block32"} & set(timed)
    assert (result.chosen.recipe, result.chosen.latency_ms) == ("w8a8", 0.9)
    # A second search goes on from what is known.
    assert made.run("onnx").chosen == result.chosen and len(made.in_turns) == 1


def test_where_size_is_asked_for_nothing_is_timed_in_turns(search) -> None:
    made, _ = search()
    assert made.in_turns == []


def test_the_recipes_proposed_are_names_that_can_be_read() -> None:
    assert all(parse_recipe(name).name == name for name in FIGURES)


def test_where_nothing_can_be_built_it_is_said_why(search, capsys, tmp_path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise BuildError("onnx: the converter failed. See the log.")

    monkeypatch.setattr(Handmade, "_measure", refuse)
    _, result = search()
    assert (result.chosen, result.candidates) == (None, ())
    plan = SimpleNamespace(stem="eyelid-x", request=SimpleNamespace(out=tmp_path))
    _show(result, plan, 0.1, "mm", False)
    printed = capsys.readouterr().out
    # One line for one reason, whatever the number of recipes.
    assert printed.count("the converter failed") == 1
    assert "not built: fp16, w4-block32, " in printed
    assert "nothing could be built" in printed
    assert list(tmp_path.iterdir()) == []
