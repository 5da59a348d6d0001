"""Presets side by side: each an ordinary run; a comparison goes on where it was cut off."""

import pytest

from dinotrain.checkpoint import read_config
from dinotrain.compare import compare_presets, over_seeds
from dinotrain.digests import digest
from dinotrain.errors import UsageError
from dinotrain.fit import train
from dinotrain.tasks import get_task
from dinotrain.train_config import TrainConfig


@pytest.fixture(scope="module")
def shared(tmp_path_factory, tiny_backbone):
    folder = tmp_path_factory.mktemp("gazes")
    get_task("classify").synthesise(30, 2, folder / "data")
    return {
        "task": "classify",
        "data": folder / "data",
        "backbone": str(tiny_backbone),
        "image_size": (28, 28),
        "epochs": 2,
        "cache": folder / "cache",
        "device": "cpu",
    }


def test_both_recipes_are_trained_once_and_are_what_train_gives(shared, tmp_path):
    found = compare_presets(shared, tmp_path / "both")
    assert {name: h.training["mode"] for name, (h,) in found.items()} == {
        "transfer": "frozen",
        "finetune": "finetune",
    }
    # The article's recipes differ in what trains and in the rate, and share the rest.
    assert {h.training["optimizer"] for (h,) in found.values()} == {"sgd"}
    preset = get_task("classify").presets["transfer"]
    alone = TrainConfig(
        **{**preset, **shared, "out": tmp_path / "a.safetensors", "name": "transfer-0"}
    )
    assert digest(train(alone)) == digest(tmp_path / "both" / "transfer-0.safetensors")

    def never(stage, done, total, note=""):
        raise AssertionError("a finished run was trained again")

    again = compare_presets(shared, tmp_path / "both", progress=never)
    assert again == found
    assert [read_config(tmp_path / "both" / "finetune-0.safetensors")] == found["finetune"]


def test_runs_of_another_recipe_are_not_taken_for_these(shared, tmp_path):
    compare_presets({**shared, "epochs": 1}, tmp_path)
    with pytest.raises(UsageError, match=r"epochs = 1, not 2\. Give another --out"):
        compare_presets(shared, tmp_path)


def test_a_task_without_recipes(shared, tmp_path):
    with pytest.raises(UsageError, match="task eyelid has no recipes to compare"):
        compare_presets({**shared, "task": "eyelid"}, tmp_path)


def test_figures_over_seeds(shared, tmp_path):
    headers = compare_presets({**shared, "epochs": 1}, tmp_path, seeds=2)["transfer"]
    assert [h.training["seed"] for h in headers] == [0, 1]
    mean, deviation = over_seeds(headers, "test")
    a, b = (h.metrics["test"]["probabilities"]["log_loss"] for h in headers)
    assert mean["probabilities"]["log_loss"] == pytest.approx((a + b) / 2)
    assert deviation["probabilities"]["log_loss"] == pytest.approx(abs(a - b) / 2**0.5)
    assert over_seeds(headers[:1], "test")[1] == {}
