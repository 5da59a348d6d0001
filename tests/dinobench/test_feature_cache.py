"""The benchmark of the feature cache: its verdict, on times that are given."""

import json

import pytest
import typer
from typer.testing import CliRunner

from dinobench import feature_cache


@pytest.mark.parametrize(
    ("memory_s", "disk_s", "passed"),
    [(0.01, 0.1, True), (0.01, 0.3, False), (0.3, 0.01, False)],
    ids=["fast", "slow files", "slow memory"],
)
def test_the_slower_way_from_the_cache_is_judged(monkeypatch, memory_s, disk_s, passed) -> None:
    times = ([4.0, 9.0, 4.0], [memory_s] * 15, [disk_s] * 15)
    monkeypatch.setattr(feature_cache, "measure", lambda *args: times)
    app = typer.Typer()
    app.command()(feature_cache.run)
    result = CliRunner().invoke(app, ["--json"])
    report = json.loads(result.stdout)
    assert report["ratio"] == pytest.approx(4 / max(memory_s, disk_s), rel=0.01)
    assert report["passed"] == passed
    assert result.exit_code == (0 if passed else 1)
    assert report["pictures"] >= 64
    assert "wanted" in CliRunner().invoke(app, []).stdout
    assert CliRunner().invoke(app, ["--pictures", "10"]).exit_code == 2
