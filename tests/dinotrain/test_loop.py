"""The loop: fine-tuning, gradient accumulation, several processes, and what each leaves alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from msgspec.structs import replace

from dinotrain.checkpoint import load_checkpoint, read_config
from dinotrain.digests import digest
from dinotrain.errors import UsageError
from dinotrain.features import FeatureStore
from dinotrain.fit import evaluate, train
from dinotrain.heads.branch import HeadConfig
from dinotrain.train_config import TrainConfig
from dinotrain.training_state import state_path


@pytest.fixture
def config(config: TrainConfig) -> TrainConfig:
    return replace(config, head=HeadConfig(hidden=16, dropout=0.0), batch_size=6, epochs=3)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path)[0].state_dict()


def losses(path: Path) -> list[float]:
    return read_config(path).training["log"]["loss"]


def moved(path: Path, start: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in tensors(path).items() if not torch.equal(value, start[name])}


FINETUNE = {"mode": "finetune", "backbone_lr": 1e-3, "augment": True}


def test_fine_tuning_moves_the_backbone_and_late_layers_most(config, tmp_path):
    frozen = tensors(train(config))
    path = train(replace(config, out=tmp_path / "b.safetensors", layer_decay=0.3, **FINETUNE))
    tuned = tensors(path)
    names = [f"backbone.blocks.{i}.mlp.fc1.weight" for i in range(4)]
    steps = [(tuned[name] - frozen[name]).abs().max() for name in names]
    assert 0 < steps[0] < steps[1] < steps[2] < steps[3]
    # Adam's step is the rate: 0.3 of it per block.
    assert float(steps[0] / steps[3]) == pytest.approx(0.3**3, rel=0.5)
    # A token that replaces masked patches takes no part.
    assert torch.equal(tuned["backbone.mask_token"], frozen["backbone.mask_token"])
    assert read_config(path).training["mode"] == "finetune"


def test_frozen_training_leaves_the_backbone_alone(config, tiny_backbone):
    from dinotrain.backbones import load_backbone

    start = load_backbone(tiny_backbone).state_dict()
    trained = tensors(train(config))
    assert all(torch.equal(trained[f"backbone.{name}"], value) for name, value in start.items())


class KilledError(Exception):
    """Stands for a process that ends between two epochs."""


@pytest.mark.parametrize(
    "recipe",
    [FINETUNE, {"augment": True, "augment_copies": 2}, {"schedule": "sgdr", "accumulate": 2}],
    ids=["fine-tuned", "augmented features", "restarts and accumulation"],
)
def test_a_resumed_run_gives_the_same_bytes(config, tmp_path, recipe):
    recipe = replace(config, **recipe)
    whole = train(recipe)

    def kill(stage, done, total, note=""):
        if stage == "training" and done == 2:
            raise KilledError

    cut = replace(recipe, out=tmp_path / "cut.safetensors", name=read_config(whole).name)
    with pytest.raises(KilledError):
        train(cut, kill)
    assert state_path(cut.out).is_file()
    assert digest(train(replace(cut, resume=True))) == digest(whole)


def test_metrics_of_a_fine_tuned_model_are_those_of_its_file(config, tiny_eyes, cache):
    path = train(replace(config, weights="float16", **FINETUNE))
    found = evaluate(path, tiny_eyes, cache=cache)["targets"]
    for name, metrics in read_config(path).metrics["test"].items():
        # Batches of another size: float32 sums in another order.
        assert found[name]["mae_mm"] == pytest.approx(metrics["mae_mm"], rel=1e-4)


def test_accumulated_batches_are_one_step(config, tmp_path):
    """Without dropout, and where all batches count alike, k small batches are one large one."""
    plain = {"optimizer": "sgd", "lr": 0.01, "input_drop": 0.0, "schedule": "constant", "epochs": 1}
    labelled = replace(
        config,
        **plain,
        or_lambda=0.0,
        encoding=replace(config.encoding, kind="scalar"),
        loss="mse",
    )
    one = tensors(train(replace(labelled, batch_size=18)))
    parts = train(replace(labelled, batch_size=9, accumulate=2, out=tmp_path / "b.safetensors"))
    apart = train(replace(labelled, batch_size=9, out=tmp_path / "c.safetensors"))
    name = "head.members.0.mrd.4.weight"
    step = (tensors(apart)[name] - one[name]).abs().max()
    # Three eyes lack a label, so halves do not weigh quite alike.
    assert (tensors(parts)[name] - one[name]).abs().max() < 0.1 * step


def test_a_clipped_gradient_takes_small_steps(config, tmp_path):
    recipe = replace(config, optimizer="sgd", lr=0.1, epochs=1, schedule="constant")
    one = tensors(train(replace(recipe, epochs=1, lr=1e-9)))
    free = tensors(train(replace(recipe, out=tmp_path / "b.safetensors")))
    held = tensors(train(replace(recipe, clip_norm=1e-3, out=tmp_path / "c.safetensors")))
    name = "head.members.0.mrd.4.weight"
    assert (held[name] - one[name]).norm() < 0.1 * (free[name] - one[name]).norm()


@pytest.mark.parametrize("live", [False, True])
def test_batch_norm_statistics_stay_unless_asked_for(config, tiny_convnet, tmp_path, live):
    recipe = replace(
        config,
        backbone=str(tiny_convnet),
        image_size=(32, 32),
        live_statistics=live,
        epochs=1,
        **FINETUNE,
    )
    start = tensors(train(replace(recipe, mode="frozen")))
    names = moved(train(replace(recipe, out=tmp_path / "b.safetensors")), start)
    statistics = {n for n in start if n.endswith(("running_mean", "running_var"))}
    assert statistics
    assert bool(names & statistics) == live
    assert {n for n in names if n.startswith("backbone.") and n.endswith("weight")}


def test_two_processes_draw_the_curve_of_one(config, tmp_path):
    """The same global batch: the same losses, up to the order of float32 sums."""
    for recipe in ({"mode": "frozen"}, FINETUNE):
        one = replace(config, out=tmp_path / "one.safetensors", batch_size=7, **recipe)
        wanted = losses(train(one))
        two = replace(one, out=tmp_path / "two.safetensors", devices=2, cache=tmp_path / "cache")
        run_elsewhere(two, tmp_path)
        found = losses(two.out)
        np.testing.assert_allclose(found, wanted, rtol=2e-5)
        # The planted fault: a process that trained on its half alone would be far off.
        half = replace(one, out=tmp_path / "half.safetensors", batch_size=4)
        assert np.abs(np.array(losses(train(half))) / wanted - 1).max() > 1e-3


def run_elsewhere(config: TrainConfig, folder: Path) -> None:
    """Train in a fresh process, which starts the others itself."""
    recipe = folder / "recipe.json"
    recipe.write_bytes(msgspec.json.encode(config, enc_hook=str))
    script = folder / "run.py"
    script.write_text(
        "import sys, msgspec, torch\n"
        "from pathlib import Path\n"
        "from dinotrain.fit import train\n"
        "from dinotrain.train_config import TrainConfig\n"
        "torch.set_num_threads(1)\n"
        "hook = lambda kind, value: kind(value)\n"
        "text = Path(sys.argv[1]).read_bytes()\n"
        "train(msgspec.json.decode(text, type=TrainConfig, dec_hook=hook))\n"
    )
    done = subprocess.run(
        [sys.executable, script, recipe],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_strategies_that_are_not_to_be_had(config):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError, match=r"fsdp shards over GPUs, and there is none\. Use ddp"):
        train(replace(config, strategy="fsdp"))
    with pytest.raises(UsageError, match="amp float16 needs a GPU"):
        train(replace(config, amp="float16"))


def test_bfloat16_trains(config):
    path = train(replace(config, amp="bfloat16", epochs=2))
    assert all(np.isfinite(losses(path)))


def test_a_page_and_events_are_written_beside(config, tmp_path):
    path = train(replace(config, report=True, events=tmp_path / "events", epochs=2))
    page = path.with_suffix(".html").read_text(encoding="utf-8")
    for text in ("Training", "Validation: ", "Test: ", "mrd1_mm", "not a medical device", "bit 8"):
        assert text in page
    assert list((tmp_path / "events").iterdir())
    assert json.loads(msgspec.json.encode(read_config(path).training))["epochs"] == 2


def test_bits_are_judged_on_test_samples(config, tiny_eyes, cache):
    """Against the decoder's own probabilities of the plain code, bit by bit."""
    recipe = replace(config, encoding=replace(config.encoding, kind="plain", bits=3))
    path = train(recipe)
    found = read_config(path).training["bit_calibration_error"]
    model = load_checkpoint(path)[0]
    dataset = model.task.read(tiny_eyes, image_size=(28, 28))
    part = dataset.split("test")
    store = FeatureStore(model, cache)
    with torch.no_grad():
        batch = store.batch(part.samples)
        p = model.decoder.bit_probabilities(model.logits(batch.inputs, batch.present))[:, 0, 0]
    levels = np.floor((part.labels(["mrd1"])[:, 0] + 6) / 16 * 8).astype(int)
    for bit in range(3):
        truth = (levels >> (2 - bit)) & 1
        bins = np.minimum((p[:, bit].numpy() * 15).astype(int), 14)
        gaps = [
            abs(p[bins == b, bit].mean().item() - truth[bins == b].mean()) * (bins == b).mean()
            for b in np.unique(bins)
        ]
        # Rounded to four digits in the header.
        assert found["mrd1_mm"][bit] == pytest.approx(sum(gaps), abs=1e-4)
    scalar = replace(config, encoding=replace(config.encoding, kind="scalar"))
    assert read_config(train(scalar)).training["bit_calibration_error"] == {}
