"""Training: it learns, stops, survives being killed, and resumes to the same bits."""

import json
import os
import signal
import subprocess
import sys
import time

import msgspec
import numpy as np
import pytest
import torch
from msgspec.structs import replace

from dinotrain import fit, loop
from dinotrain.backbones import load_backbone
from dinotrain.checkpoint import load_checkpoint, read_config
from dinotrain.digests import digest
from dinotrain.encoding import Encoding
from dinotrain.errors import CheckpointError, DataError, ShapeError, UsageError
from dinotrain.fit import evaluate, train
from dinotrain.heads.branch import HeadConfig
from dinotrain.heads.pool import FeatureConfig
from dinotrain.training_state import state_path


class KilledError(Exception):
    """Stands for a process that ends between two epochs."""


def kill_after(epoch: int):
    def progress(stage, done, total, note=""):
        if stage == "training" and done == epoch:
            raise KilledError

    return progress


def test_a_run_ends_in_one_checkpoint_that_tells_its_story(config, tiny_backbone):
    told = []
    path = train(config, lambda *args: told.append(args))
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]
    model, found = load_checkpoint(path)
    assert found.trained_on.endswith(
        "30 samples of 30 subjects (train 18, val 6, test 6); backbone: tiny.safetensors"
    )
    assert "not a medical device" in found.notice
    assert set(found.metrics) == {"val", "test"}
    assert found.metrics["test"]["mrd1_mm"]["n"] == 6
    assert found.metrics["test"]["mrd1_mm"]["mean_predictor"]["mae_mm"] > 0
    assert found.training["log"]["epoch"] == [1, 2, 3, 4]
    assert found.training["lr"] == 1e-3
    assert found.versions["torch"] == torch.__version__
    assert [args[1] for args in told if args[0] == "training"] == [1, 2, 3, 4]
    source = load_backbone(tiny_backbone).state_dict()
    assert all(torch.equal(source[k], v) for k, v in model.backbone.state_dict().items())


def test_stored_metrics_are_those_of_the_stored_weights(config, tiny_eyes, cache):
    """The deployed path (pixels in, no cache, no placeholders code) agrees with the metrics."""
    path = train(replace(config, weights="float16"))
    found = read_config(path)
    again = evaluate(path, tiny_eyes, cache=cache)
    assert again["targets"] == found.metrics["test"]
    assert not again["seen_in_training"]
    assert evaluate(path, tiny_eyes, split="all", cache=cache)["seen_in_training"]
    model, _ = load_checkpoint(path)
    dataset = model.task.read(tiny_eyes, image_size=(28, 28)).split("test")
    errors = []
    for sample in dataset.samples:
        if len(sample.images) < 3:
            continue
        pixels = {
            name: torch.from_numpy(dataset.load(image)).permute(2, 0, 1).unsqueeze(0)
            for name, image in sample.images.items()
        }
        errors.append(model(pixels)["mrd1_mm"].item() - sample.values["mrd1"])
    full = tuple(s for s in dataset.samples if len(s.images) == 3)
    store = fit.FeatureStore(model, cache)
    cached = fit.predict(model, store, full)["mrd1_mm"] - [s.values["mrd1"] for s in full]
    # Same float32 operations, batch 1 against batch 6.
    np.testing.assert_allclose(errors, cached, atol=1e-4)


def test_it_learns_what_the_features_hold(config):
    path = train(replace(config, epochs=150, patience=150, lr=5e-3, input_drop=0.0))
    metrics = read_config(path).metrics["val"]
    # A random backbone still sees a bar's edge; the mean predictor does not.
    for name in ("mrd1_mm", "mrd2_mm"):
        assert metrics[name]["mae_mm"] < 0.9 * metrics[name]["mean_predictor"]["mae_mm"]


@pytest.mark.parametrize("mode", ["frozen", "finetune"])
def test_the_overlap_of_gradients_is_reported_and_changes_nothing(config, mode, tmp_path):
    config = replace(config, mode=mode, epochs=2)
    told = []
    with_it = train(replace(config, orthogonality="grad"), lambda *args: told.append(args[3:]))
    without = train(replace(config, orthogonality="none", out=tmp_path / "none.safetensors"))
    story = read_config(with_it).training
    assert len(story["log"]["gradient_overlap"]) == 2
    assert all(0 < value < 1 for value in story["log"]["gradient_overlap"])
    assert "gradient overlap 0." in told[-1][0]
    assert "gradient_overlap" not in read_config(without).training["log"]
    assert story["log"]["loss"] == read_config(without).training["log"]["loss"]
    states = [load_checkpoint(path)[0].state_dict() for path in (with_it, without)]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        ("plain", "bce"),
        ("thermometer", "focal"),
        ("johnson", "bce"),
        ("scalar", "focal_r"),
        ("gaussian", "nll"),
    ],
)
def test_it_learns_in_every_encoding(config, kind, loss):
    config = replace(
        config,
        encoding=Encoding(kind=kind, bits=5),
        loss=loss,
        epochs=100,
        patience=100,
        lr=5e-3,
        input_drop=0.0,
    )
    found = read_config(train(config))
    assert found.training["loss"] == loss
    row = found.metrics["val"]["mrd1_mm"]
    assert row["mae_mm"] < 0.95 * row["mean_predictor"]["mae_mm"]


@pytest.mark.parametrize("kind", ["plain", "gray"])
@pytest.mark.parametrize("head", ["linear", "ensemble"])
def test_a_head_starts_at_the_mean_of_the_labels(config, tiny_eyes, tiny_backbone, kind, head):
    config = replace(config, encoding=Encoding(kind=kind), head=HeadConfig(kind=head))
    model = fit.build_model(config, load_backbone(tiny_backbone)).eval()
    dataset = model.task.read(tiny_eyes, image_size=(28, 28)).split("train")
    labels = dataset.labels(["mrd1", "mrd2", "lf"])
    model.task.objective(replace(config, loss="bce"), model).start_(labels)
    for weight in model.head.output_weights():
        weight.data.zero_()
    features = {i.name: torch.randn(1, model.pool.width) for i in model.task.inputs}
    outputs = model.decode(model.logits(features))
    for index, (target, middle) in enumerate((("mrd1", 2.0), ("mrd2", 8.0), ("lf", 16.0))):
        mean = np.nanmean(labels[:, index])
        # Plain bits give the mean itself, but for the floor on sure bits; Gray bits, which are
        # not independent, come nearer than zero biases, which give the middle of the range.
        allowed = 0.15 * middle if kind == "plain" else max(0.6 * abs(mean - middle), 0.8)
        assert abs(outputs[f"{target}_mm"].item() - mean) < allowed


RECIPES = {
    "mlp-gray-bce": {},
    "linear-plain-focal": {
        "head": HeadConfig(kind="linear"),
        "encoding": Encoding(kind="plain", bits=6),
        "loss": "focal",
        "bit_rho": 0.8,
    },
    "ensemble-scalar-mse": {
        "head": HeadConfig(kind="ensemble", hidden=8, members=2),
        "encoding": Encoding(kind="scalar"),
        "loss": "mse",
        "optimizer": "adamw",
        "weight_decay": 0.01,
    },
    "pyramid-constant": {
        "features": FeatureConfig(kind="pyramid", tap_norm="own_ln"),
        "schedule": "constant",
        "or_lambda": 0.0,
        "batch_size": 16,
    },
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_resumed_run_gives_the_same_bytes(config, tmp_path, recipe):
    config = replace(config, **recipe)
    whole = train(config)
    wanted = digest(whole)
    out = tmp_path / "again" / "model.safetensors"
    broken = replace(config, out=out)
    for epoch in (1, 3):
        with pytest.raises(KilledError):
            train(broken, kill_after(epoch))
        assert not out.exists()
        broken = replace(broken, resume=True)
    # The outside random state must not matter.
    torch.manual_seed(99)
    assert digest(train(broken)) == wanted
    assert not state_path(out).exists()


def test_another_seed_gives_other_weights(config, tmp_path):
    first = load_checkpoint(train(config))[0].head.state_dict()
    other = replace(config, seed=1, out=tmp_path / "other.safetensors")
    second = load_checkpoint(train(other))[0].head.state_dict()
    assert not any(torch.equal(first[k], second[k]) for k in first if k.endswith("4.weight"))


def test_resuming_with_other_choices_is_refused(config, tiny_eyes, tmp_path):
    with pytest.raises(KilledError):
        train(config, kill_after(1))
    with pytest.raises(UsageError, match=r"had lr = 0\.001, this one has 0\.002"):
        train(replace(config, lr=2e-3, resume=True))
    with pytest.raises(UsageError, match="had epochs = 4, this one has 5"):
        train(replace(config, epochs=5, resume=True))
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tiny_eyes.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    # The same data at another place are the same data.
    with pytest.raises(KilledError):
        train(replace(config, data=copy, resume=True), kill_after(2))
    table = copy / "manifest.csv"
    table.write_text(table.read_text().replace("s0,L", "s99,L"))
    with pytest.raises(UsageError, match="had data ="):
        train(replace(config, data=copy, resume=True))


def test_nothing_to_resume(config):
    with pytest.raises(UsageError, match="no interrupted training"):
        train(replace(config, resume=True))


@pytest.mark.parametrize("keep", [0, 50, -40])
def test_a_damaged_state_is_refused(config, keep):
    with pytest.raises(KilledError):
        train(config, kill_after(1))
    state = state_path(config.out)
    state.write_bytes(state.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="damaged"):
        train(replace(config, resume=True))


SCRIPT = """
import sys, msgspec, torch
from pathlib import Path
from dinotrain.fit import train
from dinotrain.train_config import TrainConfig
torch.set_num_threads(1)
config = msgspec.json.decode(sys.argv[1], type=TrainConfig, dec_hook=lambda t, v: t(v))
train(config, lambda stage, done, total, note="": print(stage, done, flush=True))
"""


def test_a_killed_process_leaves_the_old_output_and_goes_on(config):
    """SIGKILL in the middle of an epoch: the hard case that no handler sees."""
    path = train(config)
    before = path.read_bytes()
    long = replace(config, epochs=3000, patience=3000)
    text = msgspec.json.encode(long, enc_hook=str).decode()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, text], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("training 3"):
            time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    assert path.read_bytes() == before
    told = []

    def progress(stage, done, total, note=""):
        told.append((stage, done))
        if stage == "training":
            raise KilledError

    with pytest.raises(KilledError):
        train(replace(long, resume=True), progress)
    assert told[-1][1] > 3


def test_training_stops_without_progress(config):
    # A step of 1e-30 is below the last digit of every weight.
    path = train(
        replace(config, epochs=60, patience=2, lr=1e-30, schedule="constant", input_drop=0)
    )
    story = read_config(path).training
    assert len(story["log"]["epoch"]) < 60
    assert story["stopped"].startswith("no better validation error since epoch")
    assert story["best_epoch"] == len(story["log"]["epoch"]) - 2


def test_the_best_weights_are_kept(config, tiny_eyes, cache):
    path = train(replace(config, epochs=30, lr=0.05, schedule="constant", patience=30))
    story = read_config(path).training
    best = min(story["log"]["val_error"])
    assert story["log"]["val_error"][story["best_epoch"] - 1] == best
    targets = evaluate(path, tiny_eyes, split="val", cache=cache)["targets"]
    mean = np.mean([row["mae_mm"] for row in targets.values()])
    # The log keeps six digits.
    assert mean == pytest.approx(best, rel=1e-5)


def spoil(monkeypatch, after: int):
    """Make the loss NaN from some batch on: the planted fault."""
    calls = {"count": 0}
    true_loss = loop.Run._loss

    def loss(self, *args):
        calls["count"] += 1
        value = true_loss(self, *args)
        return value * float("nan") if calls["count"] > after else value

    monkeypatch.setattr(loop.Run, "_loss", loss)


def test_a_nan_loss_keeps_the_last_good_weights(config, monkeypatch, tmp_path):
    good = train(replace(config, epochs=4, schedule="constant"))
    # Three batches per epoch: batch 8 is the second of epoch 3.
    spoil(monkeypatch, after=7)
    told = []
    out = tmp_path / "b.safetensors"
    path = train(
        replace(config, out=out, schedule="constant"),
        lambda stage, done, total, note="": told.append(note),
    )
    story = read_config(path).training
    assert story["stopped"].startswith("the loss is nan in epoch 3, batch 2; the weights of epoch")
    # Who was in the batch is told, and not written into what is passed on.
    names = told[-1].removeprefix("samples of that batch: ").split(", ")
    assert len(names) == 8
    assert set(names) <= {f"s{n}/{'LR'[n % 2]}" for n in range(30)}
    assert "s1/" not in str(story)
    assert story["log"]["loss"] == read_config(good).training["log"]["loss"][:2]
    load_checkpoint(path)


def test_a_nan_loss_at_once_is_an_error_and_leaves_the_output(config, monkeypatch):
    path = train(config)
    before = path.read_bytes()
    spoil(monkeypatch, after=1)
    with pytest.raises(UsageError, match=r"nan in epoch 1, batch 2.*Lower the learning.*: s\d"):
        train(config)
    assert path.read_bytes() == before


def test_a_last_batch_that_ruins_the_weights_is_noticed(config, monkeypatch):
    """The loss is finite, its gradient is not: 0 · ∞ in the derivative of a square root."""
    true_loss = loop.Run._loss

    def loss(self, *args):
        (weight,) = list(self.model.placeholders.values())[:1]
        return true_loss(self, *args) + (0 * weight).sqrt().sum()

    monkeypatch.setattr(loop.Run, "_loss", loss)
    with pytest.raises(UsageError, match="weights are not finite after epoch 1, batch 1"):
        train(replace(config, batch_size=32))


def test_withheld_gazes_train_the_placeholders(config, tmp_path):
    model, _ = load_checkpoint(train(replace(config, input_drop=0.5)))
    assert set(model.placeholders) == {"up", "down"}
    assert all(bool(p.any()) for p in model.placeholders.values())


def without(folder, tmp_path, edit):
    """Copy a data set, with its manifest edited line by line."""
    copy = tmp_path / "edited"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    table = copy / "manifest.csv"
    lines = [edit(line.split(",")) for line in table.read_text().splitlines()]
    table.write_text("\n".join(",".join(cells) for cells in lines if cells) + "\n")
    return copy


def test_without_validation_samples_the_last_weights_are_kept(config, tiny_eyes, tmp_path):
    data = without(tiny_eyes, tmp_path, lambda cells: None if cells[7] == "val" else cells)
    found = read_config(train(replace(config, data=data)))
    assert set(found.metrics) == {"test"}
    assert found.training["best_epoch"] == 4
    with pytest.raises(DataError, match="no sample is in the split 'val'"):
        evaluate(config.out, data, split="val")


def test_a_target_without_labels_is_refused(config, tiny_eyes, tmp_path):
    def blank(cells):
        return cells if cells[6] == "lf_mm" else [*cells[:6], "", cells[7]]

    data = without(tiny_eyes, tmp_path, blank)
    with pytest.raises(DataError, match="lf_mm has 0 labels among the training samples"):
        train(replace(config, data=data))


def test_synthetic_data_and_backbones_are_named(config, tiny_eyes, tmp_path):
    data = without(tiny_eyes, tmp_path, lambda cells: cells)
    (data / "dataset.json").write_text(json.dumps({"generator": "bars", "seed": 0}))
    first = train(replace(config, data=data, backbone_note="random, synthetic"))
    found = read_config(first)
    assert found.notice.startswith("Trained on synthetic images only")
    assert found.trained_on.startswith("synthetic (bars, seed 0), 30 samples")
    # Its backbone goes on to real data, and its origin goes with it.
    second = train(
        replace(config, backbone=str(first), out=tmp_path / "second.safetensors", epochs=1)
    )
    found = read_config(second)
    assert found.trained_on.endswith("backbone: tiny.safetensors (random, synthetic)")
    assert "synthetic" in found.notice


def test_an_image_size_that_patches_do_not_tile(config):
    with pytest.raises(ShapeError, match="multiple"):
        train(replace(config, image_size=(30, 28)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": 1e38}, "lr is 1e.38"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"gamma": -1.0}, "gamma is -1.0"),
        ({"focal_r_beta": -1.0}, "focal_r_beta is -1.0"),
        ({"coverage": 1.0}, "coverage is 1.0"),
        ({"coverage": float("nan")}, "coverage is nan"),
        ({"input_drop": 1.0}, "input_drop is 1.0"),
        ({"bit_rho": 0.0}, "bit_rho is 0.0"),
    ],
    ids=str,
)
def test_choices_that_cannot_train(config, fields, message):
    with pytest.raises(UsageError, match=message):
        replace(config, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "mse"}, "does not fit encoding 'gray'"),
        ({"loss": "bce", "encoding": Encoding(kind="scalar")}, "does not fit encoding 'scalar'"),
        ({"loss": "cross_entropy"}, "accepted: bce, focal"),
        ({"orthogonality": "so", "head": HeadConfig(kind="linear")}, "this head has none"),
    ],
    ids=str,
)
def test_losses_that_do_not_fit(config, fields, message):
    with pytest.raises(UsageError, match=message):
        train(replace(config, **fields))
    assert not config.out.exists()
