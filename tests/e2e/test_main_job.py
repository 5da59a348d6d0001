"""The main job as a user runs it, on the embedded checkpoint, photographs and rendered eyes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from dinoexport.embedded import embedded_checkpoint
from dinotrain.checkpoint import read_config
from dinotrain.data.synthetic.eyes import render_eye

pytestmark = pytest.mark.e2e
TARGETS = ("onnx", "coreml", "tflite")
FP16_BUDGET_MM = 0.02


def dinoexport(*arguments: str) -> dict:
    result = subprocess.run(
        [sys.executable, "-m", "dinoexport", *arguments, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("artifacts")
    built = dinoexport("build", "--task", "eyelid", "--target", "all", "--out", str(out))
    assert [b["target"] for b in built["bundles"]] == list(TARGETS)
    assert all(b["passed"] and b["size_bytes"] > 1e6 for b in built["bundles"])
    return {b["target"]: Path(b["path"]) for b in built["bundles"]}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three crops of a portrait's eye region, as three gazes."""
    folder = tmp_path_factory.mktemp("photographs")
    portrait = Image.fromarray(data.astronaut())
    arguments = []
    for name, box in {
        "primary": (160, 60, 280, 180),
        "up": (182, 79, 226, 123),
        "down": (226, 81, 270, 125),
    }.items():
        portrait.crop(box).resize((300, 300)).save(folder / f"{name}.png")
        arguments.append(f"{name}={folder / name}.png")
    return arguments


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, float]]:
    folder = tmp_path_factory.mktemp("rendered")
    # A seed that neither training nor the parity samples use; index 0 is made a right eye below.
    index = next(i for i in range(20) if render_eye(909, i).eye == "R")
    eye = render_eye(909, index)
    arguments = []
    for gaze, image in eye.images.items():
        Image.fromarray(image).save(folder / f"{gaze}.png")
        arguments.append(f"{gaze}={folder / gaze}.png")
    return arguments, {"mrd1_mm": eye.mrd1_mm, "mrd2_mm": eye.mrd2_mm, "lf_mm": eye.lf_mm}


@pytest.mark.parametrize("source", ["photograph", "rendered"])
def test_all_targets_measure_the_same(bundles, photographs, rendered, source: str) -> None:
    images = photographs if source == "photograph" else rendered[0]
    values = []
    for target in TARGETS:
        result = dinoexport("predict", str(bundles[target]), *images)
        assert list(result["outputs"]) == ["mrd1_mm", "mrd2_mm", "lf_mm"]
        values.append(list(result["outputs"].values()))
    spread = np.ptp(np.array(values), axis=0)
    # Each artifact may be off by its budget, so two may differ by twice that.
    assert (spread <= 2 * FP16_BUDGET_MM).all(), spread


def test_rendered_eye_is_measured_true(bundles, rendered) -> None:
    images, true = rendered
    outputs = dinoexport("predict", str(bundles["onnx"]), *images)["outputs"]
    for name, value in true.items():
        # Single eyes stray further than the mean error; a wrong input order or unit strays by more.
        assert outputs[name] == pytest.approx(value, abs=2.5), name


def test_predict_draws_a_picture(bundles, rendered, tmp_path: Path) -> None:
    picture = tmp_path / "measured.png"
    dinoexport("predict", str(bundles["onnx"]), *rendered[0], "--picture", str(picture))
    with Image.open(picture) as drawn:
        assert drawn.width > 900
        assert len(drawn.convert("RGB").getcolors(1 << 24)) > 1000


@pytest.mark.parametrize("target", TARGETS)
def test_verify_repeats_the_verdict(bundles, target: str) -> None:
    verdict = dinoexport("verify", str(bundles[target]))
    built = json.loads((bundles[target] / "manifest.json").read_text())["parity"]
    assert verdict["passed"]
    assert verdict["outputs"].keys() == built["outputs"].keys()
    assert verdict["reference"] == built["reference"]
    assert verdict["blame"] is None


def test_embedded_checkpoint_keeps_its_promises() -> None:
    path = embedded_checkpoint("eyelid")
    assert path.stat().st_size <= 12e6
    config = read_config(path)
    assert config.backbone.patch_size == 14
    assert config.backbone.registers == 0
    assert "synthetic" in config.notice.lower()
    assert "medical device" in config.notice
    # How both parts were trained is in the header, epoch by epoch and step by step.
    assert len(config.training["log"]["val_error"]) == len(config.training["log"]["epoch"]) > 1
    assert config.training["backbone"]["log"][-1] == config.training["backbone"]["kept"]
    targets = config.metrics["test"]
    for name, budget_mm in {"mrd1_mm": 0.5, "mrd2_mm": 0.5, "lf_mm": 1.0}.items():
        mae = targets[name]["mae_mm"]
        assert mae <= budget_mm
        assert mae < 0.5 * targets[name]["mean_predictor"]["mae_mm"]


def test_embedded_checkpoint_on_fresh_eyes(tmp_path: Path) -> None:
    """Its stored metrics are no promise: render eyes of another seed and judge them."""
    dinoexport(
        "data", "synth", "--task", "eyelid", "--count", "40", "--seed", "77", "--out", str(tmp_path)
    )
    result = dinoexport(
        "evaluate",
        str(embedded_checkpoint("eyelid")),
        "--data",
        str(tmp_path),
        "--split",
        "all",
        "--cache",
        str(tmp_path / "cache"),
    )
    budgets = {"mrd1_mm": 0.5, "mrd2_mm": 0.5, "lf_mm": 1.0}
    for name, budget_mm in budgets.items():
        assert result["targets"][name]["mae_mm"] <= budget_mm
