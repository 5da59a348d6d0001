"""Training on masks: what is refused, which weights are chosen, and how validation judges."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score

from dinotrain.data.synthetic.flaws import CLASSES
from dinotrain.errors import DataError, UsageError
from dinotrain.losses.segmentation import SegmentationLoss, segmentation_loss
from dinotrain.objectives.masks import (
    BRIEF_CLASSES,
    MAX_RATIO,
    SegmentObjective,
    choose_loss,
    class_weights,
    majority_class,
)
from dinotrain.train_config import TrainConfig

NAMES = ("ground", "crack", "stain")


def test_dice_with_focal_is_the_only_loss(tmp_path):
    config = TrainConfig(data=tmp_path, backbone="x", out=tmp_path / "a.safetensors")
    assert choose_loss(config) == "dice_focal"
    with pytest.raises(UsageError, match="accepted: dice_focal"):
        choose_loss(TrainConfig(data=tmp_path, backbone="x", out=config.out, loss="mse"))


def test_the_sources_classes_have_the_sources_weights():
    assert tuple(name.lower() for name in CLASSES) == BRIEF_CLASSES
    shares = np.array([0.97, 0.01, 0.01, 0.01])
    assert class_weights(CLASSES, shares) == (0.3, 3.0, 1.5, 1.5)
    # In another order they are another list.
    assert class_weights(CLASSES[::-1], shares) != (0.3, 3.0, 1.5, 1.5)


def test_rare_classes_weigh_more_within_limits():
    shares = np.array([0.96, 0.04, 0.0])
    ground, crack, stain = class_weights(NAMES, shares)
    assert crack / ground == pytest.approx(math.sqrt(24))
    # A class without pixels would weigh infinitely much.
    assert stain / ground == pytest.approx(MAX_RATIO)
    assert ground * 0.96 + crack * 0.04 == pytest.approx(1)
    assert class_weights(NAMES, np.full(3, 1 / 3)) == pytest.approx((1, 1, 1))


def test_loss_is_that_of_the_settings():
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5), dtype=torch.uint8)
    masks[0, 0] = 255
    settings = SegmentationLoss(class_weights=(1.0, 2.0, 3.0), gamma=1.0)
    objective = SegmentObjective(NAMES, settings)
    objective.start_(np.array([[0.9, 0.1, 0.0]]))
    wanted = segmentation_loss(logits, masks.long(), settings)
    assert objective.loss(logits, masks) == wanted
    chosen = SegmentObjective(NAMES)
    chosen.start_(np.array([[0.9, 0.1, 0.0], [np.nan] * 3]))
    assert chosen.settings.class_weights == class_weights(NAMES, np.array([0.9, 0.1, 0.0]))
    assert chosen.loss(logits, masks) != wanted


def test_what_cannot_be_learnt_is_refused():
    objective = SegmentObjective(NAMES)
    with pytest.raises(DataError, match="no pixel of the training masks has a label"):
        objective.check(np.full((2, 3), np.nan))
    with pytest.raises(DataError, match="are 'ground'; two classes or more"):
        objective.check(np.array([[1.0, 0.0, 0.0], [np.nan] * 3]))
    # One class of the list is missing: the data set's notes tell, and training goes on.
    objective.check(np.array([[0.5, 0.5, 0.0], [np.nan] * 3]))


def test_validation_is_the_mean_overlap_of_what_is_labelled():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 3, (4, 6, 7)).astype(np.uint8)
    guess = np.where(rng.random(true.shape) < 0.6, true, rng.integers(0, 3, true.shape))
    true[1, 2] = 255
    objective = SegmentObjective(NAMES)
    found = objective.validation_error({"class_map": guess.astype(np.int32)}, true)
    counted = true != 255
    wanted = 1 - jaccard_score(true[counted], guess[counted], average="macro")
    assert found == pytest.approx(wanted)
    assert objective.validation_error({"class_map": true % 255}, true) == 0
    empty = np.full_like(true, 255)
    assert objective.validation_error({"class_map": guess}, empty) is None


def test_baseline_is_the_commonest_class_of_the_labelled():
    labels = np.array([[0.2, 0.8, 0.0], [np.nan] * 3, [0.3, 0.7, 0.0]])
    baseline = SegmentObjective(NAMES).baseline(labels)
    assert baseline == pytest.approx(
        {"share of ground": 0.25, "share of crack": 0.75, "share of stain": 0.0}
    )
    assert majority_class(labels) == 1
    # What a checkpoint keeps of them gives the same answer.
    assert majority_class(np.array([list(baseline.values())])) == 1
    assert majority_class(np.full((2, 3), np.nan)) == 0
