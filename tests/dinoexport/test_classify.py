"""Classification goes the whole way: trained, built for every target, verified, predicted."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinoexport.bundle import open_bundle
from dinoexport.cli import app
from dinoexport.cli.output import run_app
from dinoexport.console import Reporter
from dinoexport.pipeline import build
from dinoexport.plan import BuildRequest
from dinoexport.predict import predict_files
from dinoexport.reverify import verify_bundle
from dinotrain.backbones.vit import ViTConfig, init_weights_
from dinotrain.checkpoint import CheckpointConfig, load_checkpoint, save_checkpoint
from dinotrain.heads.branch import HeadConfig
from dinotrain.model import TaskModel
from dinotrain.tasks import get_task

pytestmark = pytest.mark.e2e
TARGETS = ("onnx", "coreml", "tflite")
NAMES = ("cat", "dog", "newt")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble, so that both outputs are there."""
    torch.manual_seed(5)
    backbone = ViTConfig(
        name="tiny", embed_dim=32, depth=1, heads=1, ffn_dim=48, grid=(3, 3), position_rule="size"
    )
    config = CheckpointConfig(
        task="classify",
        backbone=backbone,
        image_size=(42, 42),
        head=HeadConfig(kind="ensemble", members=2, hidden=16),
        classes=NAMES,
        window_mm=0,
        orientation="",
    )
    model = TaskModel(config)
    init_weights_(model.backbone)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return save_checkpoint(model, config, tmp_path_factory.mktemp("classify") / "c.safetensors")


@pytest.fixture(scope="module")
def bundles(checkpoint: Path) -> dict[str, Path]:
    request = BuildRequest("classify", "all", checkpoint.parent / "out", checkpoint, "fp16")
    result = build(request, Reporter(enabled=False))
    assert result.passed, [b.verdict.blame for b in result.bundles]
    return {b.target: b.path for b in result.bundles}


@pytest.fixture(scope="module")
def photograph(checkpoint: Path) -> Path:
    file = checkpoint.parent / "photograph.png"
    image = get_task("classify").render_samples(1, (84, 84))[0]["image"]
    Image.fromarray(image).save(file)
    return file


@pytest.mark.parametrize("target", TARGETS)
def test_the_artifact_gives_what_the_model_gives(bundles, checkpoint, photograph, target):
    found = predict_files(bundles[target], [str(photograph)])
    assert list(found.outputs) == ["probabilities", "probabilities_std"]
    assert set(found.units.values()) == {"probability"}
    assert found.class_names == NAMES
    pixels = np.asarray(Image.open(photograph).resize((42, 42), Image.Resampling.BICUBIC))
    model, _ = load_checkpoint(checkpoint)
    with torch.no_grad():
        wanted = model({"image": torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]})
    budget = get_task("classify").budgets.float16
    for name, values in found.outputs.items():
        assert len(values) == len(NAMES)
        np.testing.assert_allclose(values, wanted[name][0], atol=budget)
    assert sum(found.outputs["probabilities"]) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("target", TARGETS)
def test_bundles_say_what_they_are(bundles, target):
    manifest = open_bundle(bundles[target]).manifest
    assert manifest.class_names == NAMES
    assert [(o.name, o.shape, o.unit) for o in manifest.outputs] == [
        ("probabilities", (1, 3), "probability"),
        ("probabilities_std", (1, 3), "probability"),
    ]
    assert [i.name for i in manifest.inputs] == ["image"]
    assert "mm window" not in manifest.preprocessing.app
    assert manifest.preprocessing.window_mm == 0
    verdict = verify_bundle(bundles[target], None, Reporter(enabled=False))
    assert verdict.passed
    assert {o.unit for o in verdict.outputs.values()} == {"probability"}


@pytest.mark.parametrize("target", TARGETS)
def test_weights_of_another_head_fail_the_gate(bundles, checkpoint, tmp_path, target):
    """Classes swapped in the head: the same file sizes, taps and names, other probabilities."""
    model, config = load_checkpoint(checkpoint)
    for member in model.head.members:  # type: ignore[union-attr]
        layer = member["classes"][-1]
        with torch.no_grad():
            layer.weight.copy_(layer.weight.flip(0))
            layer.bias.copy_(layer.bias.flip(0))
    other = save_checkpoint(model, config, tmp_path / "c.safetensors")
    built = build(
        BuildRequest("classify", target, tmp_path, other, "fp16"), Reporter(enabled=False)
    )
    path = built.bundles[0].path
    # Only the digest that ties a reference to its checkpoint is made to fit.
    reference = open_bundle(bundles[target]).reference.read_bytes()
    theirs = open_bundle(bundles[target]).manifest.checkpoint.sha256
    ours = open_bundle(path).manifest.checkpoint.sha256
    file = tmp_path / "reference.safetensors"
    file.write_bytes(reference.replace(theirs.encode(), ours.encode()))
    verdict = verify_bundle(path, file, Reporter(enabled=False))
    assert not verdict.passed
    assert verdict.blame
    assert verdict.blame.layer == "head"


def test_predict_in_words_and_pictures(bundles, photograph, tmp_path, capfd):
    drawn = tmp_path / "drawn.png"
    arguments = ["predict", str(bundles["onnx"]), str(photograph), "--picture", str(drawn)]
    assert run_app(app, arguments) == 0
    lines = capfd.readouterr().out.splitlines()
    shown = {line.split()[1]: float(line.split()[2]) for line in lines if line.startswith("prob")}
    assert shown.keys() >= set(NAMES)
    assert lines[0].startswith("probabilities: ")
    assert Image.open(drawn).width > 800
    for option in (["--eye", "L"], ["--px-per-mm", "9"]):
        assert run_app(app, [*arguments, *option]) == 2
        assert option[0] in capfd.readouterr().err


def test_train_and_evaluate_on_rendered_gazes(tmp_path, capfd):
    """From nothing to figures by the command line; which way an eye looks is plain to see."""

    def run(*arguments: object) -> dict:
        assert run_app(app, [*map(str, arguments), "--json"]) == 0, capfd.readouterr().err
        return json.loads(capfd.readouterr().out)

    data, out = tmp_path / "gazes", tmp_path / "gaze.safetensors"
    run("data", "synth", "--task", "classify", "--count", 90, "--seed", 3, "--out", data)
    checked = run("data", "check", data, "--task", "classify")
    assert checked["classes"] == {"down": 30, "primary": 30, "up": 30}
    common = ("--data", data, "--cache", tmp_path / "cache")
    trained = run(
        "train", "--task", "classify", *common, "--head", "linear",
        "--lr", 0.01, "--epochs", 100, "--out", out,
    )  # fmt: skip
    assert "synthetic" in trained["notice"]
    assert "medical" not in trained["notice"]
    found = run("evaluate", out, *common, "--split", "all")["targets"]["probabilities"]
    assert found["n"] == 90
    assert found["majority_class"]["accuracy"] == pytest.approx(1 / 3, abs=0.05)
    # Three in four, when one in three is chance; this recipe gave 0.94.
    assert found["accuracy"] > 0.75
    assert load_checkpoint(out)[1].classes == ("down", "primary", "up")
    # Data of other classes are refused in one line.
    (data / "train" / "away").mkdir()
    Image.new("RGB", (40, 40)).save(data / "train" / "away" / "1.png")
    assert run_app(app, ["evaluate", str(out), *map(str, common)]) == 2
    assert "are not those of the checkpoint" in capfd.readouterr().err
