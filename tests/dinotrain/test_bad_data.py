"""Bad data on the way through training: what is masked, left out, refused, and who is named."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from dinotrain import loop
from dinotrain.checkpoint import load_checkpoint, read_config
from dinotrain.errors import DataError, UsageError
from dinotrain.fit import evaluate, train
from dinotrain.probe import probe
from dinotrain.train_config import TrainConfig

FINETUNE = {"mode": "finetune", "backbone_lr": 1e-4}
WAYS = {
    "frozen": {},
    "accumulated": {"accumulate": 2},
    "mixed precision": {"amp": "bfloat16"},
    "fine-tuned": FINETUNE,
    "all at once": {"accumulate": 2, "amp": "bfloat16", **FINETUNE},
}


@pytest.fixture
def eyes(tiny_eyes, tmp_path) -> Path:
    """Return a folder of eyes that a test may spoil."""
    return Path(shutil.copytree(tiny_eyes, tmp_path / "eyes"))


@pytest.fixture
def config(config: TrainConfig, eyes: Path) -> TrainConfig:
    return replace(config, data=eyes, batch_size=6, epochs=2, schedule="constant")


def edit(folder: Path, column: str, text: str, subjects: set[str] | None = None) -> None:
    """Write a text into a column of the manifest, of some subjects or of all."""
    file = folder / "manifest.csv"
    with file.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    for row in rows:
        if subjects is None or row["subject_id"] in subjects:
            row[column] = text
    with file.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def cut(file: Path) -> None:
    """Cut a picture short behind its header."""
    file.write_bytes(file.read_bytes()[:-400])


# --- labels


@pytest.mark.parametrize("way", ["frozen", "fine-tuned"])
def test_eyes_without_any_label_are_masked(config, eyes, way):
    for column in ("mrd1_mm", "mrd2_mm", "lf_mm"):
        edit(eyes, column, "nan", {"s0", "s1", "s3"})
    # One eye a batch: some have no label at all.
    path = train(replace(config, batch_size=1, epochs=1, **WAYS[way]))
    log = read_config(path).training["log"]
    assert torch.tensor(log["loss"]).isfinite().all()
    load_checkpoint(path)


@pytest.mark.parametrize("way", ["frozen", "fine-tuned"])
def test_a_target_without_labels_is_refused(config, eyes, way):
    edit(eyes, "lf_mm", "")
    with pytest.raises(DataError, match=r"lf_mm has 0 labels among the training samples"):
        train(replace(config, **WAYS[way]))
    assert not config.out.exists()


# --- pictures that cannot be read


@pytest.mark.parametrize("way", ["frozen", "fine-tuned"])
def test_unreadable_pictures_stop_a_run_before_it_starts(config, eyes, way):
    for name in ("0_up.png", "5_primary.png", "8_down.png"):
        cut(eyes / name)
    told = []
    with pytest.raises(DataError) as caught:
        train(replace(config, **WAYS[way]), lambda *event: told.append(event[0]))
    for text in ("3 problems", "0_up.png", "5_primary.png", "8_down.png", "row ", "--skip"):
        assert text in str(caught.value)
    assert not {"features", "training"} & set(told)


@pytest.mark.parametrize("way", ["frozen", "fine-tuned"])
def test_a_run_can_go_on_without_them(config, eyes, cache, way):
    for name in ("0_up.png", "5_primary.png"):
        cut(eyes / name)
    notes = []
    skipping = replace(config, skip_unreadable=True, report=True, **WAYS[way])
    path = train(skipping, lambda stage, done, total, note="": notes.append(note))
    assert "left out 2 pictures that cannot be read:" in notes
    assert any("0_up.png" in note and "keeps its other pictures" in note for note in notes)
    assert any("5_primary.png" in note and "s5/R is left out" in note for note in notes)
    header = read_config(path)
    # The checkpoint names neither files nor people; the page beside it does.
    assert header.training["skipped"] == 2
    assert "primary.png" not in str(header.training)
    assert "s5/R is left out" in path.with_suffix(".html").read_text(encoding="utf-8")
    assert "29 samples" in header.trained_on
    with pytest.raises(DataError, match="2 problems"):
        evaluate(path, eyes, cache=cache)
    found = evaluate(path, eyes, cache=cache, skip_unreadable=True)
    assert len(found["skipped"]) == 2
    assert found["dataset_fingerprint"] == header.dataset_fingerprint
    # What was used, and nothing else, is what the fingerprint is of.
    file = eyes / "manifest.csv"
    lines = file.read_text().splitlines()
    kept = [line for line in lines if ",0_up.png," not in line and not line.startswith("s5,")]
    file.write_text("\n".join(kept))
    assert evaluate(path, eyes, cache=cache)["dataset_fingerprint"] == header.dataset_fingerprint


def test_a_probe_can_go_on_without_them(tmp_path, tiny_eyes, tiny_backbone, cache):
    for file in sorted(tiny_eyes.glob("*.png")):
        place = tmp_path / "data" / file.stem.split("_")[1] / file.name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    cut(tmp_path / "data" / "up" / "3_up.png")
    config = TrainConfig(
        task="classify",
        data=tmp_path / "data",
        backbone=str(tiny_backbone),
        out=tmp_path / "p.safetensors",
        image_size=(28, 28),
        cache=cache,
        device="cpu",
    )
    with pytest.raises(DataError, match=r"up/3_up.png: the picture is truncated"):
        probe(config, iterations=2)
    result = probe(replace(config, skip_unreadable=True), iterations=2)
    assert read_config(result.path).training["skipped"] == 1


# --- a loss that is not finite


def spoil(monkeypatch, call: int) -> list[set[str]]:
    """Make the loss of one batch NaN, counted over the run; gives who was in each batch."""
    batches: list[set[str]] = []
    true_loss = loop.Run._loss

    def loss(self, chosen, *rest):
        batches.append({self.samples[index].name for index in chosen})
        value = true_loss(self, chosen, *rest)
        return value * float("nan") if len(batches) == call else value

    monkeypatch.setattr(loop.Run, "_loss", loss)
    return batches


@pytest.mark.parametrize("way", WAYS)
def test_a_nan_loss_stops_names_its_batch_and_keeps_the_last_good_weights(
    config, monkeypatch, tmp_path, way
):
    recipe = replace(config, **WAYS[way])
    good = train(replace(recipe, epochs=1))
    # Three batches an epoch: the fifth is the second of the second epoch.
    batches = spoil(monkeypatch, call=5)
    told = []
    path = train(
        replace(recipe, out=tmp_path / "b.safetensors"),
        lambda stage, done, total, note="": told.append(note),
    )
    stopped = read_config(path).training["stopped"]
    assert stopped == "the loss is nan in epoch 2, batch 2; the weights of epoch 1 are kept"
    assert set(told[-1].removeprefix("samples of that batch: ").split(", ")) == batches[4]
    kept, wanted = (load_checkpoint(p)[0].state_dict() for p in (path, good))
    assert all(torch.equal(kept[name], wanted[name]) for name in wanted)


def test_a_gradient_that_ruins_the_weights_is_blamed(config, monkeypatch):
    """The loss of the first batch is finite, its gradient is not: 0 · ∞ in a square root."""
    batches: list[set[str]] = []
    true_loss = loop.Run._loss

    def loss(self, chosen, *rest):
        batches.append({self.samples[index].name for index in chosen})
        value = true_loss(self, chosen, *rest)
        if len(batches) > 1:
            return value
        return value + sum((0 * p).sqrt().sum() for p in self.model.head.parameters())

    monkeypatch.setattr(loop.Run, "_loss", loss)
    with pytest.raises(UsageError) as caught:
        train(config)
    text = str(caught.value)
    assert "in epoch 1, batch 2, because the step of batch 1 left weights that are not" in text
    assert set(text.partition("its samples: ")[2].split(", ")) == batches[0]
