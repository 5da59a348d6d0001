"""Segmentation: what the task promises, what training asks, what people see."""

import msgspec
import numpy as np
import pytest
import torch

from dinotrain.backbones.vit import ViTConfig
from dinotrain.data.masks import IGNORE
from dinotrain.data.synthetic.flaws import CLASSES
from dinotrain.errors import UsageError
from dinotrain.heads.branch import HeadConfig
from dinotrain.heads.pool import FeatureConfig
from dinotrain.heads.segmentation import DecoderConfig
from dinotrain.model import ModelConfig, TaskModel
from dinotrain.tasks import get_task
from dinotrain.tasks.segment_drawing import class_colour, draw_class_map, overlay
from dinotrain.tasks.sheet import PAPER
from dinotrain.train_config import TrainConfig

TASK = get_task("segment")
SIZE = (28, 42)
VIT = ViTConfig(name="t", embed_dim=16, depth=3, heads=1, ffn_dim=16, grid=(2, 2))
SMALL = HeadConfig(kind="multiscale", decoder=DecoderConfig(channels=(8, 8, 4, 4)))
MAPS = FeatureConfig(kind="maps", tap_norm="none")


def config(features: FeatureConfig = MAPS) -> ModelConfig:
    return ModelConfig(
        task="segment",
        backbone=VIT,
        image_size=SIZE,
        head=SMALL,
        features=features,
        classes=CLASSES,
    )


@pytest.fixture(scope="module")
def surfaces(tmp_path_factory):
    return TASK.read(TASK.synthesise(6, 0, tmp_path_factory.mktemp("s") / "metal"), image_size=SIZE)


def test_a_model_gives_what_is_promised():
    torch.manual_seed(0)
    model = TaskModel(config()).eval()
    given = model({"image": torch.rand(1, 3, *SIZE) * 255})
    (promised,) = TASK.outputs(model.config)
    assert list(given) == [promised.name] == ["class_map"]
    assert tuple(given["class_map"].shape) == promised.shape == (1, *SIZE)
    assert str(given["class_map"].dtype).removeprefix("torch.") == promised.dtype == "int32"
    assert promised.description.endswith("0 Background, 1 Dust, 2 Rundown, 3 Scratch")


def test_vectors_are_no_maps():
    with pytest.raises(UsageError, match="'cls_mean' are no maps"):
        TaskModel(config(FeatureConfig()))


def test_the_sources_head_has_its_parameters():
    vit_b = ViTConfig(name="b", embed_dim=768, depth=12, heads=12, ffn_dim=3072, grid=(37, 37))
    with torch.device("meta"):
        model = TaskModel(
            msgspec.structs.replace(
                config(), backbone=vit_b, image_size=(518, 518), head=HeadConfig(kind="multiscale")
            )
        )
    assert sum(p.numel() for p in model.head.parameters()) == 1_202_436
    assert model.pool.taps == (3, 7, 11)


def test_truth_is_the_masks_and_moves_with_the_picture(surfaces):
    true = TASK.truth(surfaces.samples, SIZE)
    assert (true.shape, true.dtype) == ((6, *SIZE), np.uint8)
    pixels, mask = TASK.load(surfaces.samples[1], SIZE)
    assert np.array_equal(mask, true[1])
    assert pixels["image"].shape == (*SIZE, 3)
    moved = [TASK.load(surfaces.samples[1], SIZE, np.random.default_rng(s))[1] for s in range(6)]
    assert TASK.truth_moves
    assert all(mask.shape == SIZE and mask.dtype == np.uint8 for mask in moved)
    assert any(not np.array_equal(mask, true[1]) for mask in moved)
    bare = msgspec.structs.replace(surfaces.samples[0], mask=None)
    assert (TASK.truth([bare], SIZE) == IGNORE).all()


def test_labels_are_the_shares_of_the_classes(surfaces):
    names = TASK.label_names(surfaces.classes)
    assert names == tuple(f"share of {name}" for name in CLASSES)
    assert surfaces.labels(names).sum(axis=1) == pytest.approx(np.ones(6))


def test_error_is_the_share_of_the_worst_sample():
    expected = np.zeros((2, 1, 4, 5))
    actual = expected.copy()
    actual[0, 0, 0, 0] = actual[1, 0, 0, :3] = 2
    # By how much a class differs means nothing.
    assert TASK.error(expected, actual) == 3 / 20
    assert TASK.error(expected, expected) == 0


def test_evaluation_knows_what_a_model_without_pictures_would_say(surfaces):
    true = TASK.truth(surfaces.samples, SIZE)
    reference = surfaces.labels(TASK.label_names(CLASSES))
    found = TASK.evaluate({"class_map": true.astype(np.int32)}, true, reference, CLASSES)
    row = found["class_map"]
    assert row["mean_iou"] == 1
    assert row["majority_predictor"]["class"] == "Background"
    assert row["majority_predictor"]["mean_iou"] < 0.5
    # As `evaluate` has it: one row of what the checkpoint keeps.
    other = TASK.evaluate(
        {"class_map": true.astype(np.int32)}, true, np.array([[0.1, 0.2, 0.7, 0.0]]), CLASSES
    )
    assert other["class_map"]["majority_predictor"]["class"] == "Rundown"


@pytest.mark.parametrize("name", ["brief", "frozen"])
def test_presets_are_recipes(name, tmp_path):
    places = {"data": tmp_path, "backbone": "x", "out": tmp_path / "a.safetensors"}
    found = TrainConfig(task="segment", **places, **TASK.presets[name])
    assert (found.optimizer, found.weight_decay, found.batch_size) == ("adamw", 0.01, 8)
    assert (found.restart_epochs, found.restart_mult, found.min_lr) == (66, 2, 1e-6)
    assert (found.epochs, found.clip_norm, found.min_delta) == (200, 1.0, 0.001)
    assert found.lr == {"brief": 1e-5, "frozen": 1e-3}[name]
    assert found.patience == {"brief": 5, "frozen": 20}[name]
    assert found.mode == {"brief": "finetune", "frozen": "frozen"}[name]


def test_samples_for_parity_are_always_the_same():
    first, again = TASK.render_samples(2, SIZE), TASK.render_samples(2, SIZE)
    assert [list(sample) for sample in first] == [["image"]] * 2
    assert all(np.array_equal(a["image"], b["image"]) for a, b in zip(first, again, strict=True))
    assert first[0]["image"].shape == (*SIZE, 3)
    assert not np.array_equal(first[0]["image"], first[1]["image"])


def test_synthetic_pictures_are_read_by_the_task(surfaces):
    assert surfaces.synthetic
    assert surfaces.classes == CLASSES


# --- drawing


def test_an_overlay_colours_the_classes_and_nothing_else():
    image = np.full((20, 30, 3), 100, np.uint8)
    ids = np.zeros((20, 30), int)
    ids[5:12, 4:14] = 2
    ids[0, 0] = IGNORE
    found = overlay(image, ids)
    assert (found[ids != 2] == 100).all()
    assert tuple(found[5, 4]) == class_colour(2)
    # Inside the photograph still shows.
    inner = 100 + 0.45 * (np.array(class_colour(2)) - 100)
    assert np.abs(found[8, 8] - inner).max() <= 0.5


def test_a_drawing_names_the_classes_that_are_there():
    image = np.full((40, 40, 3), 90, np.uint8)
    ids = np.zeros((1, 40, 40), np.int32)
    plain = np.asarray(draw_class_map(image, ids, "", CLASSES))
    ids[0, 10:20, 10:20], ids[0, 30, 5:25] = 1, 3
    drawn = np.asarray(TASK.draw({"image": image}, {"class_map": ids}, "a notice", CLASSES))
    assert drawn.shape[1] == plain.shape[1]
    # A row for each of two classes, and the notice.
    assert drawn.shape[0] > plain.shape[0] + 60

    def holds(picture, colour):
        return (np.abs(picture.astype(int) - colour).max(axis=2) < 8).any()

    assert holds(drawn, class_colour(1))
    assert holds(drawn, class_colour(3))
    assert not holds(drawn, class_colour(2))
    assert not holds(plain, class_colour(1))
    assert holds(plain, PAPER)
