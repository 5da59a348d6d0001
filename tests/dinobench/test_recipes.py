"""The table of recipes from recorded builds; nothing is built here."""

import msgspec
import pytest
import typer

from dinobench import recipes
from dinobench.process import ProcessCost
from dinobench.recipes import problems, run, supporting, table
from dinobench.result import Artifact, BuildCost

LISTED = {
    "fp32": {"is": "float", "onnx": "everywhere", "coreml": "CPU", "tflite": "everywhere"},
    "fp16": {"is": "float", "onnx": "everywhere", "coreml": "everywhere", "tflite": "everywhere"},
    "pal6": {"is": "palettes", "onnx": "-", "coreml": "iOS 18", "tflite": "-"},
}


def artifact(target: str, size_mb: float, error: float, passed: bool = True) -> Artifact:
    return Artifact(
        target=target,
        size_mb=size_mb,
        passed=passed,
        worst_error=error,
        unit="mm",
        structure_db=120.0,
    )


def built(recipe: str, *artifacts: Artifact, error: str = "") -> BuildCost:
    return BuildCost(
        model="embedded",
        target="all",
        precision=recipe,
        wall_s=9.0,
        peak_gb=1.0,
        artifacts=artifacts,
        error=error,
    )


HALF = built("fp16", artifact("onnx", 6.49, 0.0014), artifact("tflite", 6.56, 0.0009))
FAILED = built("w8", artifact("onnx", 3.39, 0.7, passed=False))
KILLED = built("pal6", error="it gave no bundle (status -9)")


def test_a_row_for_each_recipe_and_a_dash_where_a_target_lacks_it() -> None:
    assert table([HALF, FAILED, KILLED]) == [
        "| recipe | ONNX MB, mm | Core ML MB, mm | TFLite MB, mm |",
        "|---|---|---|---|",
        "| fp16 | 6.49, 0.001 | – | 6.56, 0.001 |",
        "| w8 | 3.39, 0.70 | – | – |",
        "| pal6 | – | – | – |",
    ]


def test_what_failed_is_said() -> None:
    assert problems([HALF]) == []
    assert problems([HALF, FAILED, KILLED]) == [
        "pal6: it gave no bundle (status -9)",
        "w8 for onnx: parity failed",
    ]


def test_a_recipe_is_built_for_the_targets_that_have_it() -> None:
    assert supporting(LISTED["pal6"]) == ["coreml"]
    assert supporting(LISTED["fp16"]) == ["onnx", "coreml", "tflite"]


def test_what_is_known_is_not_built_again(monkeypatch, tmp_path, capsys) -> None:
    asked: list[str] = []

    def measured(command: list[str]) -> ProcessCost:
        stdout = msgspec.json.encode(LISTED).decode()
        if "build" in command:
            asked.append(command[command.index("--precision") + 1])
            output = {"unit": "mm", "max_error": 0.05}
            parity = {"outputs": {"mrd1_mm": output}, "structure": {"worst_db": 120.0}}
            target = command[command.index("--target") + 1].split(",")[0]
            bundle = {"target": target, "size_bytes": 2e6, "passed": True, "parity": parity}
            stdout = msgspec.json.encode({"bundles": [bundle]}).decode()
        return ProcessCost(status=0, wall_s=1.0, cpu_s=1.0, peak_bytes=1, stdout=stdout, stderr="")

    monkeypatch.setattr(recipes, "measure", measured)
    for wanted in ("pal6", ""):
        with pytest.raises(typer.Exit) as ended:
            run(wanted, 8, tmp_path)
        assert ended.value.exit_code == 0
    # fp32 is left out unless it is asked for.
    assert asked == ["pal6", "fp16"]
    assert "| pal6 | – | 2.00, 0.05 | – |" in capsys.readouterr().out
    with pytest.raises(typer.BadParameter, match="accepted: fp32, fp16, pal6"):
        run("pal7", 8, tmp_path)
