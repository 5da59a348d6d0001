"""Classification: what the task promises, what training asks, what people see."""

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dinotrain.backbones.vit import ViTConfig
from dinotrain.errors import DataError, UsageError
from dinotrain.heads.branch import HeadConfig
from dinotrain.model import ModelConfig, TaskModel
from dinotrain.tasks import get_task
from dinotrain.train_config import TrainConfig

TASK = get_task("classify")
NAMES = ("cat", "dog", "newt")


def config(kind: str = "linear", classes: tuple[str, ...] = NAMES) -> ModelConfig:
    backbone = ViTConfig(
        name="t", embed_dim=16, depth=1, heads=1, ffn_dim=16, grid=(2, 2), position_rule="size"
    )
    return ModelConfig(
        task="classify",
        backbone=backbone,
        image_size=(28, 28),
        head=HeadConfig(kind=kind, members=3, hidden=8),
        classes=classes,
    )


@pytest.fixture
def training(tmp_path) -> TrainConfig:
    return TrainConfig(
        data=tmp_path, backbone="none", out=tmp_path / "a.safetensors", task="classify"
    )


@pytest.mark.parametrize("kind", ["linear", "mlp", "ensemble"])
def test_a_model_gives_what_is_promised(kind):
    torch.manual_seed(0)
    model = TaskModel(config(kind)).eval()
    given = model({"image": torch.full((1, 3, 28, 28), 99.0)})
    promised = TASK.outputs(model.config)
    assert list(given) == [o.name for o in promised]
    assert [tuple(v.shape) for v in given.values()] == [o.shape for o in promised]
    assert given["probabilities"].sum().item() == pytest.approx(1, abs=1e-6)
    assert promised[0].description.endswith("cat, dog, newt")
    assert ("probabilities_std" in given) == (kind == "ensemble")


def test_an_ensemble_gives_mean_and_spread_of_its_members():
    model = TaskModel(config("ensemble"))
    logits = torch.randn(4, 3, 1, 3)
    given = model.decode(logits)
    members = torch.stack([F.softmax(logits[:, m, 0], -1) for m in range(3)])
    torch.testing.assert_close(given["probabilities"], members.mean(0))
    torch.testing.assert_close(given["probabilities_std"], members.std(0, correction=0))


def test_one_class_is_no_classifier():
    with pytest.raises(DataError, match="two or more"):
        TaskModel(config(classes=("cat",)))


def test_loss_and_validation_against_plain_formulas(training):
    model = TaskModel(config("ensemble"))
    objective = TASK.objective(training, model)
    logits = torch.randn(4, 3, 1, 3)
    labels = torch.tensor([[0.0], [2.0], [float("nan")], [1.0]], dtype=torch.float64)
    rows = [
        -torch.log_softmax(logits[b, m, 0], -1)[int(labels[b, 0])]
        for b in (0, 1, 3)
        for m in range(3)
    ]
    torch.testing.assert_close(objective.loss(logits, labels), torch.stack(rows).mean())
    p = {"probabilities": np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])}
    true = np.array([[0.0], [1.0]])
    assert objective.validation_error(p, true) == pytest.approx(-np.log(0.5 * 0.1) / 2)
    assert objective.validation_error(p, np.full((2, 1), np.nan)) is None


def test_a_head_starts_at_the_shares_of_the_classes(training):
    model = TaskModel(config("mlp")).eval()
    objective = TASK.objective(training, model)
    labels = np.array([[0.0]] * 6 + [[1.0]] * 3 + [[2.0]] + [[np.nan]])
    objective.start_(labels)
    for member in model.head.members:
        member["classes"][-1].weight.data.zero_()
    given = model({"image": torch.zeros(1, 3, 28, 28)})["probabilities"]
    np.testing.assert_allclose(given[0].detach(), [0.6, 0.3, 0.1], atol=1e-6)
    assert objective.baseline(labels) == {"class": 0.0}


def test_classes_with_too_few_samples_are_named(training):
    objective = TASK.objective(training, TaskModel(config()))
    objective.check(np.array([[0.0], [0], [1], [1], [2], [2]]))
    with pytest.raises(DataError, match="class 'dog' has fewer than 2 training samples, and so"):
        objective.check(np.array([[0.0], [0], [1], [2]]))


def test_losses(training):
    assert TASK.choose_loss(training) == "cross_entropy"
    with pytest.raises(UsageError, match="accepted: cross_entropy"):
        TASK.choose_loss(msgspec.structs.replace(training, loss="bce"))


def test_the_majority_class_comes_from_the_training_labels():
    p = {"probabilities": np.array([[0.2, 0.7, 0.1], [0.2, 0.7, 0.1]])}
    reference = np.array([[2.0], [2.0], [0.0], [np.nan]])
    found = TASK.evaluate(p, np.array([[1.0], [2.0]]), reference, NAMES)["probabilities"]
    assert found["accuracy"] == 0.5
    assert found["majority_class"]["name"] == "newt"


@pytest.mark.parametrize("size", [(14, 14), (56, 56), (42, 70), (70, 42)], ids=str)
def test_samples_for_parity(size):
    first, second = (TASK.render_samples(3, size) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one["image"].shape == (*size, 3)
        assert np.ptp(one["image"]) > 60
        np.testing.assert_array_equal(one["image"], other["image"])
    assert not np.array_equal(first[0]["image"], first[1]["image"])


def test_bars_are_as_long_as_the_probabilities():
    image = np.full((56, 56, 3), 128, np.uint8)
    outputs = {"probabilities": np.array([[0.25, 0.7, 0.05]])}
    drawn = np.asarray(TASK.draw({"image": image}, outputs, "a notice", NAMES)).astype(int)
    lengths = []
    # Bars are the only rows with a long run of one colour that is neither paper nor photograph.
    for top in (36 + 37, 36 + 54 + 37, 36 + 108 + 37):
        row = drawn[top, 36 + 448 + 36 :]
        filled = np.abs(row - row[2]).sum(axis=1) < 12
        lengths.append(filled[2:].argmin() + 2)
    assert lengths == pytest.approx([0.7 * 460, 0.25 * 460, 0.05 * 460], abs=3)


def test_many_classes_and_long_names_fit():
    names = tuple(f"a class with a name that goes on and on, number {i}" for i in range(30))
    p = np.random.default_rng(0).dirichlet(np.ones(30))
    image = np.zeros((28, 98, 3), np.uint8)
    plain = TASK.draw({"image": image}, {"probabilities": p}, "", names)
    spread = {"probabilities": p, "probabilities_std": p / 9}
    assert TASK.draw({"image": image}, spread, "", names).size == plain.size
    assert np.ptp(np.asarray(plain)[:, -30:], axis=(0, 1)).max() == 0, (
        "something is written into the margin"
    )
