"""Planted outlier channels: plain W8A8 collapses, smoothed W8A8 keeps the task's metric."""

import pytest
import typer
from typer.testing import CliRunner

from dinobench import outliers
from dinobench.outliers import COLLAPSE, KEEP, Accuracy, judge


@pytest.mark.e2e
def test_smoothing_saves_what_outliers_ruin(monkeypatch) -> None:
    monkeypatch.setattr(outliers, "RECIPES", ("fp32", "w8", "w8a8", "w8a8:smooth"))
    report = outliers.study(outliers.small_config(), 1200, 400, [])
    found = {row.recipe: row.accuracy for row in report.rows}
    assert report.passed, found
    assert found["fp32"] > 0.85 and found["w8"] > 0.9 * found["fp32"]
    assert found["w8a8"] < COLLAPSE * found["fp32"]
    assert found["w8a8:smooth"] >= KEEP * found["fp32"]
    assert report.peak_ratio > 50


def rows(**accuracy: float) -> list[Accuracy]:
    return [
        Accuracy(recipe=name.replace("_", ":"), runtime="some", accuracy=value)
        for name, value in accuracy.items()
    ]


@pytest.mark.parametrize(
    ("plain", "smoothed", "passed"),
    [(0.5, 0.9, True), (0.5, 0.88, False), (0.85, 0.9, False)],
    ids=["saved", "not saved", "no collapse"],
)
def test_the_verdict_wants_both(monkeypatch, plain, smoothed, passed) -> None:
    found = rows(fp32=0.9, w8a8=plain, w8a8_smooth=smoothed)
    assert judge(found) == passed
    report = outliers.OutlierReport(
        machine=outliers.describe_machine(),
        model="m",
        pictures=400,
        peak_ratio=90.0,
        rows=tuple(found),
        passed=judge(found),
    )
    monkeypatch.setattr(outliers, "study", lambda *args: report)
    app = typer.Typer()
    app.command()(outliers.run)
    result = CliRunner().invoke(app, ["--small", "--target", ""])
    assert result.exit_code == (0 if passed else 1)
    assert ("holds" if passed else "BROKEN") in result.stdout
    assert "| w8a8:smooth |" in result.stdout
