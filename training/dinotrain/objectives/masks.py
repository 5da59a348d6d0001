"""Classes of pixels: Dice and focal loss, validated by the mean overlap. Source: METHODS C."""

from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinotrain.data.dataset import share_names
from dinotrain.errors import DataError, UsageError
from dinotrain.losses.segmentation import SegmentationLoss, segmentation_loss
from dinotrain.metrics.segmentation import confusion_matrix, overlap
from dinotrain.objectives.base import Objective, Values

if TYPE_CHECKING:
    from dinotrain.train_config import TrainConfig

LOSS = "dice_focal"
BRIEF_CLASSES = ("background", "dust", "rundown", "scratch")
"""The source's class list, for which it gives weights."""

MAX_RATIO = 10.0
"""Largest weight over the smallest: the source's own ratio, 3.0 of dust to 0.3 of background."""


def choose_loss(config: "TrainConfig") -> str:
    """Return Dice with focal, the only loss of masks.

    Raises:
        UsageError: another one is named.
    """
    if config.loss not in ("", LOSS):
        raise UsageError(f"loss '{config.loss}' does not fit task {config.task}; accepted: {LOSS}")
    return LOSS


def class_weights(classes: tuple[str, ...], shares: Values) -> tuple[float, ...]:
    """Weights of the focal loss: the source's for its four classes, else by how rare a class is.

    Others weigh 1 / √share, the rarest at most ``MAX_RATIO`` times the commonest, divided so that
    the mean over pixels is 1. The root stays near the source's ratios (1 : 10 : 5 : 5), where the
    inverse share itself would make a class of one pixel in ten thousand outweigh all else.

    Args:
        classes: names in the order of their ids.
        shares: (classes,), share of the training pixels.

    Returns:
        A weight per class.
    """
    if tuple(name.lower() for name in classes) == BRIEF_CLASSES:
        return SegmentationLoss().class_weights
    raw = 1 / np.sqrt(np.maximum(shares, shares.max() / MAX_RATIO**2))
    return tuple((raw / (raw * shares).sum()).tolist())


class SegmentObjective(Objective):
    """One class per pixel; pixels of 255 do not count.

    Args:
        classes: their names, in the order of their ids.
        loss: settings; without class weights ``start_`` chooses them, see ``class_weights``.
    """

    error_name = "1 - mIoU"

    def __init__(self, classes: tuple[str, ...], loss: SegmentationLoss | None = None) -> None:
        self.classes = classes
        self.settings = loss or SegmentationLoss(class_weights=())

    def check(self, labels: Values) -> None:
        """Ask for two classes among the training pixels: of one there is nothing to tell apart.

        A class without training pixels is no error where two others have some: a list of classes
        is often longer than what a data set shows, and the data set notes it.
        """
        labelled = np.isfinite(labels).all(axis=1)
        if not labelled.any():
            raise DataError(
                "no pixel of the training masks has a label: all are 255. Label some of them."
            )
        present = [
            name
            for name, n in zip(self.classes, (labels[labelled] > 0).sum(axis=0), strict=True)
            if n
        ]
        if len(present) < 2:
            raise DataError(
                f"all labelled pixels of the training masks are '{present[0]}'; two classes or "
                "more are needed. Add pictures whose masks show another one."
            )

    def start_(self, labels: Values) -> None:
        """Choose the class weights; biases stay 0, as the source has them."""
        if not self.settings.class_weights:
            weights = class_weights(self.classes, _mean_shares(labels))
            self.settings = msgspec.structs.replace(self.settings, class_weights=weights)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Dice and focal.

        Args:
            logits: (B, classes, H, W).
            labels: (B, H, W) uint8, class ids and 255.
        """
        return segmentation_loss(logits, labels.to(torch.int64), self.settings)

    def validation_error(
        self, predicted: dict[str, NDArray], true: NDArray[np.uint8]
    ) -> float | None:
        """Return 1 − the mean IoU over all pixels of the set; None where no pixel has a label.

        Args:
            predicted: ``class_map`` (n, H, W), class ids.
            true: (n, H, W) uint8.
        """
        total = np.zeros((len(self.classes), len(self.classes)), dtype=np.int64)
        for guess, mask in zip(predicted["class_map"], true, strict=True):
            total += confusion_matrix(guess, mask, len(self.classes))
        found = [value for value in overlap(total)[0] if value is not None]
        return 1 - sum(found) / len(found) if found else None

    def baseline(self, labels: Values) -> dict[str, float]:
        """Return the classes' shares of the training pixels; the largest is what to answer."""
        return dict(zip(share_names(self.classes), _mean_shares(labels).tolist(), strict=True))


def majority_class(labels: Values) -> int:
    """Return the id of the commonest class, 0 where nothing is known.

    Args:
        labels: (m, classes), shares; NaN where there is no label.
    """
    labelled = labels[np.isfinite(labels).all(axis=1)]
    return int(labelled.mean(axis=0).argmax()) if len(labelled) else 0


def _mean_shares(labels: Values) -> Values:
    return labels[np.isfinite(labels).all(axis=1)].mean(axis=0)
