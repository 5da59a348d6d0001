"""A study gives what single runs give, survives being cut off anywhere, and guards its folder."""

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from filelock import FileLock

from dinotrain.backbones import load_backbone
from dinotrain.backbones.weights import save_backbone
from dinotrain.checkpoint import read_config
from dinotrain.encoding import Encoding
from dinotrain.errors import DataError, UsageError
from dinotrain.fit import train
from dinotrain.heads.branch import HeadConfig
from dinotrain.study import runs
from dinotrain.study.ledger import RESULTS, Ledger
from dinotrain.study.runs import run_study
from dinotrain.tasks.eyelid import EyelidTask
from dinotrain.train_config import TrainConfig


class KilledError(Exception):
    """Stands for a process that ends."""


def kill(*args, **kwargs):
    raise KilledError


@pytest.fixture
def epochs_trained(monkeypatch):
    """Epochs that runs go through, as (checkpoint's stem, epoch); a test may end one there."""
    told, end_at = [], []
    inner = runs.train

    def spied(config, progress):
        def tell(stage, done, total, note=""):
            if stage == "training":
                told.append((config.out.stem, done))
                if told[-1] in end_at:
                    raise KilledError
            progress(stage, done, total, note)

        return inner(config, tell)

    monkeypatch.setattr(runs, "train", spied)
    return told, end_at


def plain(records):
    """Records without what a clock says."""
    return [msgspec.to_builtins(msgspec.structs.replace(r, seconds=None)) for r in records]


def test_the_table_is_that_of_single_runs(finished, tiny_eyes, tiny_backbone, tmp_path):
    """Of recipes that are written out by hand, in another folder, with a cache of their own."""
    variants = [
        {"encoding": Encoding(kind="scalar"), "orthogonality": "none"},
        {"loss": "focal", "gamma": 4.0},
    ]
    for variant, fields in zip(finished.request.variants, variants, strict=True):
        errors = []
        for seed in (0, 1):
            out = train(
                TrainConfig(
                    data=tiny_eyes,
                    backbone=str(tiny_backbone),
                    out=tmp_path / "single.safetensors",
                    image_size=(28, 28),
                    head=HeadConfig(hidden=16),
                    batch_size=8,
                    epochs=2,
                    seed=seed,
                    cache=tmp_path / "cache",
                    device="cpu",
                    **fields,
                )
            )
            errors.append(read_config(out).metrics["test"]["lf_mm"]["mae_mm"])
        found = finished.figure(variant, "lf_mm", "mae_mm")
        assert found.seeds == 2
        assert found.mean == np.mean(errors)
        assert found.std == pytest.approx(np.std(errors, ddof=1), rel=1e-12)
    assert finished.values(variant, "lf_mm", "mae_mm") == errors


def test_predictions_are_those_that_the_metrics_judge(finished):
    test = finished.dataset.split("test")
    true = {sample.name: sample.values["mrd1"] for sample in test.samples}
    for record in finished.records:
        values = np.array(record.predicted["mrd1_mm"])
        error = np.abs(values - [true[name] for name in record.names]).mean()
        assert error == pytest.approx(record.metrics["mrd1_mm"]["mae_mm"], rel=1e-9)


def test_a_finished_study_trains_nothing_and_draws_again(finished, request_in, monkeypatch):
    before = (finished.request.out / RESULTS).read_bytes()
    page = finished.page.read_bytes()
    finished.page.unlink()
    monkeypatch.setattr(runs, "train", kill)
    again = run_study(finished.request)
    assert plain(again.records) == plain(finished.records)
    assert (finished.request.out / RESULTS).read_bytes() == before
    assert finished.page.read_bytes() == page


def test_it_goes_on_inside_of_a_run(finished, request_in, epochs_trained, tmp_path):
    told, end_at = epochs_trained
    end_at.append(("tiny-bits-focal-4-0", 1))
    with pytest.raises(KilledError):
        run_study(request_in(tmp_path))
    assert len(Ledger(tmp_path).read()) == 1
    end_at.clear()
    again = run_study(request_in(tmp_path))
    # Each epoch once, over both processes.
    stems = ["tiny-numbers-mse", "tiny-bits-focal-4"]
    assert told == [(f"{stem}-{seed}", e) for seed in (0, 1) for stem in stems for e in (1, 2)]
    assert plain(again.records) == plain(finished.records)


def test_it_goes_on_between_runs(finished, request_in, epochs_trained, tmp_path):
    """Cut off after a checkpoint was written and before its line was."""
    told, _ = epochs_trained
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "_judge", kill)
        with pytest.raises(KilledError):
            run_study(request_in(tmp_path))
    assert not (tmp_path / RESULTS).exists()
    again = run_study(request_in(tmp_path))
    assert told.count(("tiny-numbers-mse-0", 2)) == 1
    assert plain(again.records) == plain(finished.records)


def test_more_seeds_may_follow_and_checkpoints_may_go(finished, request_in, tmp_path):
    run_study(request_in(tmp_path, seeds=1, keep=False))
    assert list((tmp_path / "runs").glob("*.safetensors")) == []
    again = run_study(request_in(tmp_path, keep=False))
    assert plain(again.records) == plain(finished.records)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"epochs": 3}, "bits / focal, γ = 4: epochs = 2, this one has 3"),
        ({"image_size": (42, 42)}, "image_size = [28, 28], this one has [42, 42]"),
        ({"data": None}, "eyes rendered = 0, this one has 400"),
    ],
)
def test_another_recipe_is_refused_before_any_work(
    finished, request_in, changes, says, monkeypatch
):
    monkeypatch.setattr(runs, "_render", kill)
    with pytest.raises(UsageError, match="give another --out") as caught:
        run_study(request_in(finished.request.out, **changes))
    assert says in str(caught.value)


@pytest.fixture
def edited(tiny_eyes):
    """A manifest beside the tiny one, some text in it replaced."""
    other = tiny_eyes / "edited.csv"

    def edit(old: str, new: str):
        other.write_text((tiny_eyes / "manifest.csv").read_text().replace(old, new))
        return other

    yield edit
    other.unlink()


def test_other_data_are_refused(finished, request_in, edited):
    with pytest.raises(UsageError, match="holds a study with data = "):
        run_study(request_in(finished.request.out, data=edited("s0,", "s100,")))


def test_another_backbone_is_refused(finished, request_in, tmp_path):
    model = load_backbone(finished.request.backbone)
    model.cls_token.data += 1
    other = tmp_path / "other.safetensors"
    save_backbone(model, other)
    with pytest.raises(UsageError, match="holds a study with backbone = "):
        run_study(request_in(finished.request.out, backbone=str(other)))


def test_a_foreign_folder_is_refused(request_in, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds no study"):
        run_study(request_in(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".study.lock", "thesis.txt"]


def test_two_processes_in_one_folder_are_refused(finished, request_in):
    with (
        FileLock(finished.request.out / ".study.lock", is_singleton=False),
        pytest.raises(UsageError, match="another study is running"),
    ):
        run_study(finished.request)


def test_a_torn_line_is_named(finished, request_in, tmp_path):
    run_study(request_in(tmp_path, seeds=1))
    file = tmp_path / RESULTS
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + lines[1][:50])
    with pytest.raises(DataError, match="line 2 is no record"):
        run_study(request_in(tmp_path, seeds=1))


def test_data_without_a_test_split_are_refused(request_in, edited, tmp_path):
    with pytest.raises(DataError, match="no sample is in the split 'test'"):
        run_study(request_in(tmp_path, data=edited(",test", ",train")))


def test_blank_splits_are_drawn_with_each_seed(request_in, edited, tmp_path):
    blank = edited(",train", ",")
    blank.write_text(blank.read_text().replace(",val", ",").replace(",test", ","))
    result = run_study(request_in(tmp_path, data=blank))
    assert not result.one_split
    first, second = (run for run in result.runs[result.request.variants[0]])
    assert set(first.names) != set(second.names)


def test_eyes_are_rendered_once(request_in, tiny_eyes, monkeypatch, tmp_path):
    asked = []

    def copy(task, count, seed, out, progress):
        asked.append(count)
        return Path(shutil.copytree(tiny_eyes, out)) / "manifest.csv"

    monkeypatch.setattr(EyelidTask, "synthesise", copy)
    request = request_in(tmp_path, data=None, count=30, seeds=1)
    first = run_study(request)
    assert plain(run_study(request).records) == plain(first.records)
    assert asked == [30]
    with pytest.raises(UsageError, match="eyes rendered = 30, this one has 31"):
        run_study(msgspec.structs.replace(request, count=31))


def test_results_are_lines_of_json(finished):
    lines = (finished.request.out / RESULTS).read_text().splitlines()
    assert len(lines) == 4
    assert [json.loads(line)["seed"] for line in lines] == [0, 0, 1, 1]
