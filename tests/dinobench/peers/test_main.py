"""The command: its exit status and what it prints, on results that are given."""

import json

import pytest
import typer
from typer.testing import CliRunner

from dinobench.peers import __main__ as command
from dinobench.peers.agreement import MismatchError
from dinobench.peers.result import GoalResult, SizeResult
from dinobench.peers.timing import Ratio

app = typer.Typer()
app.command()(command.run)


def result(reached: bool | None, missing: tuple[str, ...] = ()) -> SizeResult:
    goal = GoalResult(
        what="a ÷ b",
        above="a",
        below="b",
        ratio=Ratio(value=0.9, low=0.8, high=1.0),
        limit=None if reached is None else 0.9,
        reached=reached,
    )
    return SizeResult(
        size=224, hot=False, runs=30, gflop=12.2, rows=(), goals=(goal,), missing=missing
    )


@pytest.mark.parametrize(
    ("found", "status"),
    [(result(True), 0), (result(None), 0), (result(False), 1), (result(True, ("c ÷ d",)), 1)],
    ids=["reached", "no-limit", "not-reached", "missing"],
)
def test_exit_status_says_whether_all_is_reached(found, status, monkeypatch) -> None:
    monkeypatch.setattr(command, "measure_size", lambda *args: found)
    asked = CliRunner().invoke(app, ["--json"])
    assert asked.exit_code == status
    assert json.loads(asked.stdout)["passed"] is (status == 0)


def test_another_model_ends_the_run_without_a_table(monkeypatch) -> None:
    def refuse(*args):
        raise MismatchError("hf-dynamo: another model. Nothing was timed.")

    monkeypatch.setattr(command, "measure_size", refuse)
    asked = CliRunner().invoke(app, [])
    assert asked.exit_code == 2
    assert asked.stdout == ""
    assert "another model" in asked.stderr
