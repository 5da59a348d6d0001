"""The search on a small checkpoint: what it ships holds the budget, and a second one resumes."""

import dataclasses
import json
from pathlib import Path

import pytest

from dinoexport.bundle import artifact_digest, open_bundle
from dinoexport.cli import app
from dinoexport.cli.output import run_app
from dinoexport.pipeline import BuildResult
from dinoexport.plan import BuildRequest, plan_build
from dinoexport.search.search import Search
from dinoexport.targets.onnx import OnnxTarget

FEW = {name: OnnxTarget.supports[name] for name in ("fp16", "w8", "w4-block32")}
SMALL = ["--calibration-count", "8", "--held-out", "8"]


@pytest.fixture
def few(monkeypatch) -> None:
    """Three precisions are enough to choose among."""
    monkeypatch.setattr(OnnxTarget, "supports", FEW)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("search")


@pytest.fixture
def auto(tiny_checkpoint: Path, out: Path, capfd):
    """Run ``build --precision auto`` for ONNX; returns its status and what it printed."""

    def run(budget_mm: float, *more: str):
        arguments = ["build", "--task", "eyelid", "--target", "onnx", "--precision", "auto"]
        arguments += ["--checkpoint", str(tiny_checkpoint), "--out", str(out), *SMALL]
        capfd.readouterr()
        status = run_app(app, [*arguments, "--max-error-mm", str(budget_mm), *more])
        return status, capfd.readouterr()

    return run


@pytest.mark.e2e
def test_the_smallest_within_the_budget_ships_and_a_second_search_resumes(
    few, auto, out, monkeypatch
) -> None:
    status, printed = auto(0.2, "--json")
    facts = json.loads(printed.out)
    assert status == 0, printed.err
    search = facts["search"]["onnx"]
    held = [c for c in search["candidates"] if c["error"] <= 0.2]
    smallest = min(held, key=lambda c: c["size_bytes"])
    assert search["chosen"] == smallest["recipe"] == facts["bundles"][0]["precision"]
    assert {c["recipe"] for c in search["candidates"]} >= FEW.keys()
    assert "8 held-out samples (pictures rendered by task eyelid)" in search["judged_on"]
    # What ships is what was measured, to the byte: its name alone makes it again.
    bundle = open_bundle(Path(facts["bundles"][0]["path"]))
    assert artifact_digest(bundle.artifact) == smallest["sha256"]
    kept = bundle.manifest.budget
    assert (kept.allowed, kept.measured, kept.passed) == (0.2, smallest["error"], True)
    assert (kept.samples, kept.artifact_sha256) == (8, smallest["sha256"])
    assert kept.source == "pictures rendered by task eyelid"
    assert (out / "eyelid-tiny-56-onnx-front.svg").read_bytes().startswith(b"<?xml")

    def never(*_: object) -> None:
        raise AssertionError("measured again")

    asked: list[BuildRequest] = []

    def build(request: BuildRequest, _reporter: object) -> BuildResult:
        asked.append(request)
        return BuildResult()

    monkeypatch.setattr(Search, "_measure", never)
    monkeypatch.setattr("dinoexport.search.simulation.Simulation._run", never)
    monkeypatch.setattr("dinoexport.pipeline.build", build)
    _, printed = auto(0.2)
    assert f"> {search['chosen']} " in printed.out
    # What is built is the same recipe by its name, for the same promise.
    assert [(r.precision, r.budget) for r in asked] == [(search["chosen"], kept)]


@pytest.mark.e2e
def test_nothing_within_the_budget_is_a_failure_with_its_front(few, auto, out) -> None:
    before = sorted(p.name for p in out.iterdir() if p.is_dir())
    status, printed = auto(1e-9)
    assert status == 1
    assert "* w8 " in printed.out or "* fp16 " in printed.out
    assert "nothing holds 1e-09 mm: the least error is" in printed.out
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--precision auto needs a budget. Say how much may be lost: --max-error-mm"),
        (["--max-top1-drop", "0.1"], "--max-top1-drop is not a budget of task eyelid"),
        (["--max-error-mm", "0.1", "--prefer", "sped"], "Did you mean 'speed'?"),
        (
            ["--max-error-mm", "0.1", "--prefer", "speed", "--target", "coreml"],
            "cannot time coreml artifacts",
        ),
    ],
)
def test_bad_budgets_are_refused(tiny_checkpoint, tmp_path, capfd, arguments, says) -> None:
    command = ["build", "--task", "eyelid", "--target", "onnx", "--precision", "auto"]
    command += ["--checkpoint", str(tiny_checkpoint), "--out", str(tmp_path / "o"), *SMALL]
    assert run_app(app, [*command, *arguments]) == 2
    assert says in capfd.readouterr().err


def test_a_budget_without_auto_is_refused(tiny_checkpoint, tmp_path, capfd) -> None:
    command = ["build", "--task", "eyelid", "--target", "onnx", "--max-error-mm", "0.1"]
    command += ["--checkpoint", str(tiny_checkpoint), "--out", str(tmp_path / "o")]
    assert run_app(app, command) == 2
    assert "is a budget of --precision auto, and fp16 is asked for" in capfd.readouterr().err


def test_a_search_has_the_name_of_its_model_without_a_recipe(tiny_checkpoint, tmp_path) -> None:
    request = BuildRequest("eyelid", "onnx", tmp_path, tiny_checkpoint)
    assert plan_build(request).stem == "eyelid-tiny-56"
    columns = plan_build(dataclasses.replace(request, layout="ane", precision="w8:blocks.1=fp16"))
    assert columns.name == "eyelid-tiny-56-w8:blocks.1=fp16-ane"
    assert columns.stem == "eyelid-tiny-56-ane"


def test_a_dry_run_searches_nothing(auto, out) -> None:
    before = sorted(p.name for p in out.iterdir())
    status, printed = auto(0.1, "--dry-run")
    assert status == 0
    assert "nothing was searched or written" in printed.out
    assert sorted(p.name for p in out.iterdir()) == before
