"""Gaussians with intervals go the whole way: built for every target, verified, predicted."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from dinoexport.bundle import open_bundle
from dinoexport.console import Reporter
from dinoexport.pipeline import build
from dinoexport.plan import BuildRequest
from dinoexport.predict import predict_files
from dinotrain.backbones.vit import ViTConfig, init_weights_
from dinotrain.checkpoint import CheckpointConfig, load_checkpoint, save_checkpoint
from dinotrain.encoding import Encoding
from dinotrain.heads.branch import HeadConfig
from dinotrain.intervals import Intervals
from dinotrain.model import TaskModel
from dinotrain.tasks import get_task

pytestmark = pytest.mark.e2e
TASK = get_task("eyelid")
TARGETS = ("onnx", "coreml", "tflite")
GAZES = ("primary", "up", "down")
INTERVALS = Intervals(method="scaled", coverage=0.9, factors=(1.9, 2.1, 1.7), subjects=(40, 40, 33))


def make_checkpoint(path: Path, encoding: Encoding, head: HeadConfig, method: str) -> Path:
    """Random weights around plausible eyes."""
    torch.manual_seed(5)
    backbone = ViTConfig(
        name="tiny", embed_dim=32, depth=1, heads=1, ffn_dim=48, grid=(3, 3), position_rule="size"
    )
    config = CheckpointConfig(
        task="eyelid",
        backbone=backbone,
        image_size=(42, 42),
        encoding=encoding,
        head=head,
        intervals=msgspec.structs.replace(INTERVALS, method=method),
    )
    model = TaskModel(config)
    init_weights_(model.backbone)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.decoder.mean.copy_(torch.tensor([3.0, 6.0, 14.0]))
    model.decoder.std.copy_(torch.tensor([1.2, 1.0, 3.5]))
    return save_checkpoint(model, config, path)


def build_all(checkpoint: Path, target: str = "all", precision: str = "fp16") -> dict[str, Path]:
    request = BuildRequest("eyelid", target, checkpoint.parent / "out", checkpoint, precision)
    result = build(request, Reporter(enabled=False))
    assert result.passed, [b.verdict.blame for b in result.bundles]
    return {b.target: b.path for b in result.bundles}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("measure") / "m.safetensors",
        Encoding(kind="gaussian"),
        HeadConfig(kind="ensemble", members=3, hidden=16),
        "scaled",
    )


@pytest.fixture(scope="module")
def bundles(checkpoint: Path) -> dict[str, Path]:
    return build_all(checkpoint)


@pytest.fixture(scope="module")
def files(checkpoint: Path) -> list[str]:
    images = TASK.render_samples(1, (84, 84))[0]
    for gaze, image in images.items():
        Image.fromarray(image).save(checkpoint.parent / f"{gaze}.png")
    return [f"{gaze}={checkpoint.parent / gaze}.png" for gaze in GAZES]


@pytest.mark.parametrize("target", TARGETS)
def test_the_artifact_gives_what_the_model_gives(bundles, checkpoint, files, target):
    found = predict_files(bundles[target], files).outputs
    assert list(found) == [
        f"{name}{part}_mm" for part in ("", "_std", "_low", "_high") for name in TASK.labels
    ]
    model, _ = load_checkpoint(checkpoint)
    pixels = {}
    for gaze in GAZES:
        image = Image.open(checkpoint.parent / f"{gaze}.png")
        small = np.asarray(image.resize((42, 42), Image.Resampling.BICUBIC))
        pixels[gaze] = torch.from_numpy(small.copy()).permute(2, 0, 1)[None]
    with torch.no_grad():
        wanted = model(pixels)
    for name, value in found.items():
        assert value == pytest.approx(wanted[name].item(), abs=TASK.budgets.float16)


@pytest.mark.parametrize("target", TARGETS)
def test_the_constants_in_the_artifact_are_exact(bundles, files, target):
    """They are read off its own outputs, which are float32 whatever the precision is."""
    found = predict_files(bundles[target], files).outputs
    for name, factor in zip(TASK.labels, INTERVALS.factors, strict=True):
        value, std = found[f"{name}_mm"], found[f"{name}_std_mm"]
        for end, sign in (("low", -1), ("high", 1)):
            # A few float32 roundings below 32 mm; half precision would be off by 1e-3.
            assert found[f"{name}_{end}_mm"] == pytest.approx(value + sign * factor * std, abs=1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_bundles_state_the_coverage(bundles, target):
    outputs = {o.name: o for o in open_bundle(bundles[target]).manifest.outputs}
    assert {o.unit for o in outputs.values()} == {"mm"}
    text = outputs["lf_high_mm"].description
    assert "upper end of the 90 % interval of lf_mm" in text
    assert "33 validation subjects" in text


def test_long_codes_with_absolute_intervals_pass_their_gates(tmp_path):
    file = make_checkpoint(
        tmp_path / "m.safetensors",
        Encoding(kind="thermometer", bits=6),
        HeadConfig(kind="linear"),
        "absolute",
    )
    # Random long codes decode near ties between far levels, which enlarges what fp16 rounds.
    built = build_all(file, precision="fp32")
    assert set(built) == set(TARGETS)
    for bundle in built.values():
        names = {o.name for o in open_bundle(bundle).manifest.outputs}
        assert "lf_low_mm" in names
        assert "lf_std_mm" not in names


def test_another_factor_fails_the_gate(bundles, checkpoint, tmp_path):
    """The planted fault: LF's factor 5 % larger, all weights the same."""
    from dinoexport.reverify import verify_bundle

    model, config = load_checkpoint(checkpoint)
    wide = msgspec.structs.replace(
        INTERVALS, factors=(*INTERVALS.factors[:2], 1.05 * INTERVALS.factors[2])
    )
    model.set_intervals_(wide)
    config = msgspec.structs.replace(config, intervals=wide)
    other = save_checkpoint(model, config, tmp_path / "m.safetensors")
    path = build_all(other, "onnx")["onnx"]
    # Only the digest that ties a reference to its checkpoint is made to fit.
    reference = open_bundle(bundles["onnx"]).reference.read_bytes()
    theirs = open_bundle(bundles["onnx"]).manifest.checkpoint.sha256
    ours = open_bundle(path).manifest.checkpoint.sha256
    file = tmp_path / "reference.safetensors"
    file.write_bytes(reference.replace(theirs.encode(), ours.encode()))
    verdict = verify_bundle(path, file, Reporter(enabled=False))
    assert not verdict.passed
    failed = {name for name, parity in verdict.outputs.items() if not parity.passed}
    assert failed == {"lf_low_mm", "lf_high_mm"}
