"""Exclusive classes: cross-entropy, validated by the log loss. Source: METHODS D."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dinotrain.errors import DataError, UsageError
from dinotrain.losses.classification import cross_entropy
from dinotrain.objectives.base import Objective, Predictions, Values

if TYPE_CHECKING:
    from dinotrain.heads.branch import BranchHead
    from dinotrain.train_config import TrainConfig

MIN_LABELS = 2
LOSS = "cross_entropy"


def choose_loss(config: "TrainConfig") -> str:
    """Return cross-entropy, the only loss of classes.

    Raises:
        UsageError: another one is named.
    """
    if config.loss not in ("", LOSS):
        raise UsageError(f"loss '{config.loss}' does not fit task {config.task}; accepted: {LOSS}")
    return LOSS


class ClassObjective(Objective):
    """One label per sample, the number of its class.

    Args:
        head: gives (B, members, 1, classes); what is trained.
        classes: their names.
    """

    error_name = "log loss"

    def __init__(self, head: "BranchHead", classes: tuple[str, ...]) -> None:
        self.head = head
        self.classes = classes

    def check(self, labels: Values) -> None:
        """Ask for two training samples per class."""
        counts = _counts(labels, len(self.classes))
        few = [name for name, n in zip(self.classes, counts, strict=True) if n < MIN_LABELS]
        if few:
            raise DataError(
                f"class '{few[0]}' has fewer than {MIN_LABELS} training samples"
                + (f", and so have {len(few) - 1} more classes" if few[1:] else "")
                + ". Label more, or leave the class out."
            )

    def start_(self, labels: Values) -> None:
        """Set the output biases to the classes' shares, so that the head starts at the baseline."""
        shares = _counts(labels, len(self.classes)) / np.isfinite(labels).sum()
        self.head.set_output_bias_(torch.from_numpy(np.log(shares)).float().unsqueeze(0))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy over labelled samples and members."""
        mask = ~labels.isnan()
        return cross_entropy(logits, labels.nan_to_num(0.0).long(), mask)

    def validation_error(self, predicted: Predictions, true: Values) -> float | None:
        """Mean of −log p of the true class."""
        labelled = np.isfinite(true[:, 0])
        if not labelled.any():
            return None
        chosen = predicted["probabilities"][labelled, true[labelled, 0].astype(int)]
        return float(-np.log(np.clip(chosen, 1e-12, 1)).mean())

    def baseline(self, labels: Values) -> dict[str, float]:
        """Return the most frequent class."""
        return {"class": float(_counts(labels, len(self.classes)).argmax())}


def _counts(labels: Values, classes: int) -> np.ndarray:
    known = labels[np.isfinite(labels)].astype(int)
    return np.bincount(known, minlength=classes)
