"""The judge of growth against figures worked out by hand, and the table."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from dinobench.result import Artifact
from dinobench.scale import MAX_GROWTH, WEIGHTS_GB, ScaledBuild, judge, run, table


def build(variant: str, peak_gb: float, wall_s: float = 60.0, error: str = "") -> ScaledBuild:
    artifact = Artifact(
        target="onnx", size_mb=44.9, passed=True, worst_error=0.003, unit="mm", structure_db=120
    )
    return ScaledBuild(
        variant=variant,
        side_px=224,
        precision="fp16",
        target="onnx",
        wall_s=wall_s,
        cpu_s=90.0,
        peak_gb=peak_gb,
        artifacts=() if error else (artifact,),
        error=error,
    )


def test_growth_is_counted_from_the_smallest() -> None:
    allowed = 1.0 + MAX_GROWTH * (WEIGHTS_GB["l"] - WEIGHTS_GB["s"])
    assert judge([build("s", 1.0), build("l", allowed - 0.01)]) == []
    (said,) = judge([build("s", 1.0), build("l", allowed + 0.2)])
    assert said.startswith("ViT-L at 224, fp16: peak memory grows by 4.2 bytes")


@pytest.mark.parametrize(("peak_gb", "wall_s"), [(5.0, 1501.0), (24.1, 60.0)])
def test_the_large_one_has_limits_of_its_own(peak_gb: float, wall_s: float) -> None:
    assert any("are allowed" in line for line in judge([build("l", peak_gb, wall_s)]))
    assert judge([build("l", 5.0, 1499.0)]) == []


def test_a_build_that_failed_is_a_problem_and_in_the_table() -> None:
    failed = build("b", 3.0, error="killed")
    assert judge([build("s", 2.9), failed]) == ["ViT-B at 224, fp16: killed"]
    lines = table([build("s", 1.0), failed])
    assert lines[2] == "| S | 224 | fp16 | 60 | 90 | 1.0 | 0.09 | onnx 45 | 0.003 mm | pass |"
    assert lines[3].endswith("| killed |")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--variants", "s,x", "'x'; accepted: s, b, l, g"), ("--sizes", "224,wide", "'wide'")],
)
def test_what_is_not_to_be_built_is_refused(
    tmp_path: Path, option: str, value: str, said: str
) -> None:
    app = typer.Typer()
    app.command()(run)
    result = CliRunner().invoke(app, [option, value, "--out", str(tmp_path / "scale")])
    assert result.exit_code == 2
    # Without the frame that it is printed in.
    assert said in " ".join(result.output.replace("│", " ").split())
    assert not list(tmp_path.iterdir())
