"""How good class probabilities are: what a classifier's training run reports. Source: METHODS D."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn import metrics

from dinotrain.errors import ShapeError

Values = NDArray[np.floating]
TOP_K = 5
BINS = 15
"""Of the calibration error, by confidence."""


def evaluate_classes(
    predicted: Values, true: Values, majority: int, classes: tuple[str, ...]
) -> dict[str, Any]:
    """Judge class probabilities; rows without a label do not count.

    Args:
        predicted: (n, classes), probabilities.
        true: (n,), numbers of classes; NaN where there is no label.
        majority: number of the class that a model without pictures answers.
        classes: their names, at least two.

    Returns:
        {n, accuracy, balanced_accuracy, macro_f1, top_5_accuracy (above five classes), log_loss,
        calibration_error, majority_class: {name, accuracy, balanced_accuracy, macro_f1}, recall:
        {class: …}, confusion: rows are true, columns predicted}. Without labels only n, which is 0.

    Raises:
        ShapeError: the arrays do not fit each other or the classes.
    """
    predicted, true = np.asarray(predicted, np.float64), np.asarray(true, np.float64)
    if predicted.shape != (*true.shape, len(classes)) or true.ndim != 1:
        raise ShapeError(
            f"predicted {predicted.shape} and true {true.shape} must be (n, {len(classes)}) and "
            "(n,)"
        )
    labelled = np.isfinite(true)
    y, p = true[labelled].astype(int), predicted[labelled]
    if not len(y):
        return {"n": 0}
    ids = list(range(len(classes)))
    guess = p.argmax(axis=1)
    constant = np.full_like(y, majority)
    result: dict[str, Any] = {"n": len(y), **_scores(y, guess)}
    if len(classes) > TOP_K:
        top = metrics.top_k_accuracy_score(y, p, k=TOP_K, labels=ids)
        result[f"top_{TOP_K}_accuracy"] = float(top)
    result["log_loss"] = float(-np.log(np.clip(p[np.arange(len(y)), y], 1e-12, 1)).mean())
    result["calibration_error"] = calibration_error(p, y)
    result["majority_class"] = {"name": classes[majority], **_scores(y, constant)}
    result["confusion"] = metrics.confusion_matrix(y, guess, labels=ids).tolist()
    result["recall"] = {
        name: float((guess[y == i] == i).mean()) if (y == i).any() else None
        for i, name in enumerate(classes)
    }
    return result


def calibration_error(probabilities: Values, true: NDArray[np.integer]) -> float:
    """Mean |confidence − accuracy| over 15 bins of confidence, weighted by their samples.

    Args:
        probabilities: (n, classes).
        true: (n,), numbers of classes.
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == true
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [
        abs(confidence[bins == b].sum() - right[bins == b].sum()) for b in np.unique(bins).tolist()
    ]
    return float(sum(gaps) / len(true))


def _scores(y: NDArray[np.integer], guess: NDArray[np.integer]) -> dict[str, float]:
    present = np.unique(y)
    return {
        "accuracy": float(metrics.accuracy_score(y, guess)),
        # Over the classes that occur: a class without samples has no recall.
        "balanced_accuracy": float(metrics.recall_score(y, guess, labels=present, average="macro")),
        "macro_f1": float(metrics.f1_score(y, guess, labels=present, average="macro")),
    }
