"""data, train and evaluate: from a rendered set to figures, and every refusal by its row."""

import csv
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dinotrain.backbones.vit import VisionTransformer, ViTConfig, init_weights_
from dinotrain.backbones.weights import save_backbone
from dinotrain.checkpoint import load_checkpoint

SIZE = ("--image-size", "56")


@pytest.fixture(scope="session")
def eyes(tmp_path_factory) -> Path:
    """Twelve rendered eyes."""
    from dinotrain.tasks import get_task

    folder = tmp_path_factory.mktemp("eyes")
    get_task("eyelid").synthesise(12, 1, folder)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def edited(eyes: Path) -> Callable[..., Path]:
    """The manifest with some cells changed: (line, column, text)."""

    def edit(*changes: tuple[int, str, str]) -> Path:
        with (eyes / "manifest.csv").open(newline="") as text:
            rows = list(csv.reader(text))
        for line, column, value in changes:
            rows[line - 1][rows[0].index(column)] = value
        file = eyes / "edited.csv"
        with file.open("w", newline="") as text:
            csv.writer(text).writerows(rows)
        return file

    return edit


def test_synth_is_the_same_for_a_seed(run, tmp_path) -> None:
    sets = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        out = tmp_path / name
        result = run(
            "data",
            "synth",
            "--task",
            "eyelid",
            "--count",
            2,
            "--seed",
            seed,
            "--out",
            out,
            "--json",
        )
        assert result.json == {"manifest": str(out / "manifest.csv"), "count": 2, "seed": seed}
        sets.append({p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()})
    assert len(sets[0]) >= 7
    assert sets[0] == sets[1]
    assert sets[0] != sets[2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--count", 0], "Invalid value '0' for '--count'"),
        (["--seed", -1], "Invalid value '-1' for '--seed'"),
        (["--task", "eylid"], "Did you mean 'eyelid'?"),
    ],
)
def test_synth_refuses(refused, tmp_path, arguments, says) -> None:
    assert says in refused("data", "synth", "--count", 2, "--out", tmp_path / "new", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_synth_into_what_is_there(refused, eyes, tmp_path) -> None:
    (tmp_path / "file").touch()
    assert "is a file" in refused("data", "synth", "--count", 2, "--out", tmp_path / "file")
    assert "not empty" in refused("data", "synth", "--count", 3, "--out", eyes)


def test_check_counts(run, eyes) -> None:
    facts = run("data", "check", eyes, "--json").json
    assert facts["samples"] == 12
    assert sum(facts["splits"].values()) == 12
    assert f"train {facts['splits']['train']}, val" in run("data", "check", eyes).out


def test_bad_rows_are_named(refused, eyes, edited, tmp_path) -> None:
    file = edited(
        (2, "mrd1_mm", "3,1"),
        (3, "gaze", "left"),
        (4, "path", "../x.png"),
        (5, "path", "missing.png"),
        (6, "eye", "X"),
        (7, "mrd1_mm", "99"),
    )
    train = ("train", "--data", file, "--backbone", "embedded", "--out", tmp_path / "t.safetensors")
    for command in (("data", "check", file), train):
        error = refused(*command)
        assert error.startswith(f"DataError: {file}: 6 problems")
        for row, text in {
            2: "'3,1', not a number",
            3: "'left', not one of",
            4: "leaves the manifest's folder",
            5: "no such picture",
            6: "'X', not one of",
            7: "is 99, the range is",
        }.items():
            assert text in error.partition(f"row {row}: ")[2]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the manifest is empty"),
        (b"subject_id;eye;gaze\n", "separated by ';'"),
        (b"subject_id,\xe9\n", "not UTF-8"),
        (b"subject_id,eye,gaze,path,mrd1,mrd2_mm,lf_mm\n", "meant 'mrd1_mm'?"),
        (b"subject_id,eye,gaze,path,mrd1_mm,mrd2_mm,lf_mm\n", "no rows"),
    ],
    ids=["empty", "semicolons", "latin", "misspelt", "header-only"],
)
def test_bad_manifests(refused, tmp_path, content: bytes, says: str) -> None:
    file = tmp_path / "eyes.csv"
    file.write_bytes(content)
    assert says in refused("data", "check", file)


def test_train_then_evaluate_then_build_on_it(run, eyes, cache, tiny_checkpoint, tmp_path) -> None:
    out = tmp_path / "new" / "head.safetensors"
    result = run(
        "train", "--task", "eyelid", "--data", eyes, "--backbone", tiny_checkpoint,
        "--head", "linear", "--out", out, "--epochs", 2, "--cache", cache, *SIZE, "--json",
    )  # fmt: skip
    assert result.status == 0, result.err
    assert result.json["path"] == str(out)
    assert result.json["metrics"]["test"]["mrd1_mm"]["mae_mm"] > 0
    assert "synthetic" in result.json["notice"]
    # No log, for there was no noise, and no training state.
    assert sorted(p.name for p in out.parent.iterdir()) == ["head.html", out.name]
    assert result.json["report"] == str(out.parent / "head.html")
    assert load_checkpoint(out)[1].head.kind == "linear"

    judged = run("evaluate", out, "--data", eyes, "--cache", cache, "--json").json
    assert judged["split"] == "test"
    assert judged["targets"]["mrd1_mm"]["mae_mm"] == pytest.approx(
        result.json["metrics"]["test"]["mrd1_mm"]["mae_mm"], rel=1e-4
    )
    text = run("evaluate", out, "--data", eyes, "--cache", cache, "--split", "all").out
    assert "12 samples" in text
    assert "mean predictor" in text

    plan = run("build", "--task", "eyelid", "--target", "onnx", "--checkpoint", out, "--dry-run")
    assert plan.status == 0


def test_a_gaussian_head_states_its_deviation(run, eyes, cache, tiny_checkpoint, tmp_path) -> None:
    out = tmp_path / "head.safetensors"
    result = run(
        "train", "--data", eyes, "--backbone", tiny_checkpoint, "--head", "ensemble",
        "--members", 2, "--encoding", "gaussian", "--orthogonality", "so", "--coverage", 0,
        "--out", out, "--epochs", 1, "--cache", cache, *SIZE, "--json",
    )  # fmt: skip
    assert result.status == 0, result.err
    model, config = load_checkpoint(out)
    assert config.encoding.kind == "gaussian"
    assert config.training["loss"] == "nll"
    assert (config.training["orthogonality"], config.training["coverage"]) == ("so", 0.0)
    names = [o.name for o in model.task.outputs(config)]
    assert "mrd1_std_mm" in names
    assert "mrd1_low_mm" not in names


@pytest.mark.parametrize(
    ("option", "typed", "says"),
    [
        ("--task", "eyelids", "Did you mean 'eyelid'?"),
        ("--head", "mpl", "unknown head 'mpl'. Did you mean 'mlp'?"),
        ("--encoding", "grey", "unknown encoding 'grey'. Did you mean 'gray'?"),
        ("--encoding", "gausian", "unknown encoding 'gausian'. Did you mean 'gaussian'?"),
        ("--loss", "bcd", "Did you mean 'bce'?"),
        ("--loss", "nll", "loss 'nll' does not fit encoding 'gray' of task eyelid"),
        ("--orthogonality", "tsk", "unknown orthogonality 'tsk'. Did you mean 'task'?"),
        ("--coverage", "1", "coverage is 1.0; 0 (none) up to below 1 is accepted"),
        ("--features", "pyramids", "Did you mean 'pyramid'?"),
        ("--tap-norm", "finl", "Did you mean 'final'?"),
        ("--optimizer", "adamx", "Did you mean 'adam"),
        ("--schedule", "cosin", "Did you mean 'cosine'?"),
        ("--decoding", "sotf", "Did you mean 'soft'?"),
        ("--device", "gpu", "unknown device 'gpu'"),
        ("--weights", "float61", "Did you mean 'float16'?"),
        ("--backbone", "dinov2_vit14", "Did you mean 'dinov2_vits14'?"),
        ("--backbone", "embeded", "Did you mean 'embedded'?"),
        ("--bits", "99", "1 to 24"),
        ("--hidden", "-3", "Invalid value '-3' for '--hidden'"),
        ("--members", "1", "Invalid value '1' for '--members'"),
        ("--lr", "abc", "Invalid value 'abc' for '--lr'"),
        ("--lr", "0", "above 0"),
        ("--taps", "a,b", "--taps 'a,b'"),
        ("--taps", "1,2", "belong to --features"),
        ("--tap-norm", "none", "belong to --features"),
        ("--image-size", "230", "not a multiple of the patch size 14. Use 224 or 238."),
        ("--data", "/nowhere/eyes.csv", "no such manifest"),
    ],
)
def test_train_refuses(refused, eyes, tiny_checkpoint, tmp_path, option, typed, says) -> None:
    error = refused(
        "train", "--data", eyes, "--backbone", tiny_checkpoint, "--out", tmp_path / "t.safetensors",
        option, typed,
    )  # fmt: skip
    assert says in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_backbone_with_code_in_it(refused, eyes, tmp_path, form: str) -> None:
    mark, file = tmp_path / "ran", tmp_path / "evil.pth"
    evil = {"a": Planted(mark)}
    file.write_bytes(pickle.dumps(evil)) if form == "pickle" else torch.save(evil, file)
    out = tmp_path / "new" / "t.safetensors"
    error = refused("train", "--data", eyes, "--backbone", file, "--out", out)
    assert error.startswith(f"WeightsError: {file}: refused")
    assert not mark.exists()
    assert not out.parent.exists()
    # The code is live: whoever unpickles the file runs it.
    pickle.loads(file.read_bytes()) if form == "pickle" else torch.load(file, weights_only=False)
    assert mark.exists()


class Planted:
    """What a pickle with code in it does when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_foreign_backbones(refused, eyes, tiny_checkpoint, tmp_path) -> None:
    raw = tiny_checkpoint.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(raw[: len(raw) // 2])
    save_file({"a": torch.zeros(3)}, tmp_path / "bare.safetensors")
    for name in ("cut.safetensors", "bare.safetensors", "missing.pth"):
        error = refused(
            "train", "--data", eyes, "--backbone", tmp_path / name,
            "--out", tmp_path / "t.safetensors",
        )  # fmt: skip
        assert error.startswith(f"WeightsError: {tmp_path / name}: ")


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("t.pth", "does not end in .safetensors"),
        ("file/t.safetensors", "is a file"),
        ("folder.safetensors", "is a folder"),
    ],
)
def test_out_that_cannot_be_written(refused, eyes, tiny_checkpoint, tmp_path, out, says) -> None:
    """It is told before features are taken, not after."""
    (tmp_path / "file").touch()
    (tmp_path / "folder.safetensors").mkdir()
    cache = tmp_path / "cache"
    error = refused(
        "train", "--data", eyes, "--backbone", tiny_checkpoint, "--out", tmp_path / out,
        "--cache", cache, *SIZE,
    )  # fmt: skip
    assert says in error
    assert not cache.exists()


def test_evaluate_refuses(refused, eyes, tiny_checkpoint, tmp_path) -> None:
    bad = tmp_path / "bad.pth"
    bad.write_bytes(pickle.dumps({}))
    assert "CheckpointError" in refused("evaluate", bad, "--data", eyes)
    assert "Did you mean 'test'?" in refused(
        "evaluate", tiny_checkpoint, "--data", eyes, "--split", "tets"
    )
    assert "no such manifest" in refused("evaluate", tiny_checkpoint, "--data", tmp_path / "none")


def test_digits_are_written(run, refused, tmp_path) -> None:
    out = tmp_path / "digits"
    assert run("data", "digits", "--out", out, "--json").json == {"data": str(out), "count": 1797}
    assert len(list(out.glob("test/*/*.png"))) == 353
    (tmp_path / "file").touch()
    assert "is a file" in refused("data", "digits", "--out", tmp_path / "file")


def test_a_protocol_is_one_of_two(refused, tmp_path) -> None:
    given = ("--data", tmp_path, "--out", tmp_path / "p.safetensors", "--protocol", "wide")
    error = refused("probe", *given)
    assert "wide" in error
    assert "broad" in error
    assert "published" in error


@pytest.mark.parametrize(
    ("task", "preset", "wanted"),
    [
        (
            "segment",
            "brief",
            {"mode": "finetune", "clip_norm": 1.0, "schedule": "sgdr", "lr": 1e-5},
        ),
        ("segment", "frozen", {"mode": "frozen", "lr": 1e-3, "patience": 20}),
        ("classify", "transfer", {"mode": "frozen", "optimizer": "sgd", "schedule": "step"}),
        ("classify", "finetune", {"mode": "finetune", "backbone_lr": 1e-4, "layer_decay": 1.0}),
    ],
)
def test_a_preset_trains_and_options_beside_it_win(
    run, tmp_path, cache, tiny_checkpoint, task, preset, wanted
) -> None:
    data, count = tmp_path / "data", 30 if task == "classify" else 10
    assert run("data", "synth", "--task", task, "--count", count, "--out", data).status == 0
    backbone = tmp_path / "four.safetensors"
    vit = ViTConfig(name="four", embed_dim=16, depth=4, heads=1, ffn_dim=32, grid=(4, 5))
    save_backbone(init_weights_(VisionTransformer(vit)), backbone)
    out = tmp_path / "model.safetensors"
    result = run(
        "train", "--task", task, "--data", data, "--backbone", backbone, "--preset", preset,
        "--epochs", 1, "--image-size", "56x70", "--out", out, "--cache", cache, "--no-report",
    )  # fmt: skip
    assert result.status == 0, result.err
    header = load_checkpoint(out)[1]
    assert header.image_size == (56, 70)
    assert header.training["epochs"] == 1
    assert {name: header.training[name] for name in wanted} == wanted


def test_an_unknown_preset(refused, eyes, tmp_path) -> None:
    out = tmp_path / "t.safetensors"
    train = ("train", "--data", eyes, "--out", out)
    assert "preset of task segment 'bref'" in refused(
        *train, "--task", "segment", "--preset", "bref"
    )
