"""The section of a task that classifies: accuracies, confusions, the surest mistakes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinotrain.errors import ShapeError
from dinotrain.report.cases import Load, check_rows, strip_of, worst
from dinotrain.report.class_plots import confusion_matrix
from dinotrain.report.page import Cell, Gallery, Section, Table
from dinotrain.report.pictures import picture_grid
from dinotrain.report.text import NOTHING, count, number, percent, shorten

Values = NDArray[np.floating]

MOST_CLASSES = 60
"""Rows of the table of classes; of more, those with the lowest recall are listed."""
MOST_CONFUSIONS = 10
_NAME_COLUMNS = 70
_SCORES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "top_5_accuracy": "top-5 accuracy",
}


def class_section(
    probabilities: Values,
    true: Values,
    classes: Sequence[str],
    names: Sequence[str],
    load: Load,
    metrics: Mapping[str, Any],
) -> Section:
    """Describe class probabilities beside the labels.

    Args:
        probabilities: (n, classes).
        true: (n,), numbers of classes, NaN where there is no label.
        classes: their names.
        names: (n,), of the samples.
        load: gives the pictures of a sample.
        metrics: what ``evaluate_classes`` gives.

    Raises:
        ShapeError: the arrays do not fit each other.
    """
    p, y = np.asarray(probabilities, np.float64), np.asarray(true, np.float64)
    check_rows("true", len(y), names)
    if p.shape != (len(y), len(classes)):
        raise ShapeError(f"probabilities are {p.shape}; ({len(y)}, {len(classes)}) is needed")
    if not metrics.get("n"):
        return Section(title="Classes", text="No sample has a label: nothing can be judged.")
    counts = np.asarray(metrics["confusion"], np.int64)
    tables = [_score_table(metrics), _class_table(counts, classes)]
    mistakes = _confusion_table(counts, classes)
    tables += [mistakes] if mistakes.rows else []
    return Section(
        title="Classes",
        text="A model must beat the answer that needs no picture: always the commonest class of "
        "the training data. Balanced accuracy and macro F1 count every class alike.",
        tables=tables,
        figures=[confusion_matrix(counts, classes), _cases(p, y, classes, names, load)],
    )


def _score_table(metrics: Mapping[str, Any]) -> Table:
    shown = {key: label for key, label in _SCORES.items() if key in metrics}
    base = metrics["majority_class"]
    rows: list[list[Cell]] = [
        [
            "model",
            *(percent(metrics[key]) for key in shown),
            number(metrics["log_loss"]),
            number(metrics["calibration_error"]),
        ],
        [
            f"always {shorten(base['name'], 40)}",
            *(percent(base.get(key)) for key in shown),
            NOTHING,
            NOTHING,
        ],
    ]
    return Table(
        columns=("answer", *shown.values(), "log loss", "calibration error"),
        rows=rows,
        caption=f"{count(metrics['n'])} labelled samples",
        quiet=[1],
    )


def _class_table(counts: NDArray[np.int64], classes: Sequence[str]) -> Table:
    true, predicted, right = counts.sum(axis=1), counts.sum(axis=0), np.diag(counts)
    recall = right / np.maximum(true, 1)
    order: Sequence[int] = range(len(classes))
    caption = "Per class"
    if len(classes) > MOST_CLASSES:
        # Classes without samples have no recall: they come last.
        order = np.lexsort((recall, true == 0))[:MOST_CLASSES].tolist()
        caption = f"The {MOST_CLASSES} of {len(classes)} classes with the lowest recall"
    rows = [
        [
            shorten(classes[index], _NAME_COLUMNS),
            count(int(true[index])),
            count(int(predicted[index])),
            percent(recall[index] if true[index] else None),
            percent(right[index] / predicted[index] if predicted[index] else None),
        ]
        for index in order
    ]
    empty = int((true == 0).sum())
    caption += f"; {empty} of {len(classes)} have no sample here" if empty else ""
    return Table(
        columns=("class", "samples", "predicted", "recall", "precision"),
        rows=rows,
        caption=caption,
        quiet=[place for place, index in enumerate(order) if not true[index]],
    )


def _confusion_table(counts: NDArray[np.int64], classes: Sequence[str]) -> Table:
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_CONFUSIONS].tolist()
    pairs = [divmod(place, len(classes)) for place in order]
    rows = [
        [
            shorten(classes[true], _NAME_COLUMNS),
            shorten(classes[guess], _NAME_COLUMNS),
            count(int(wrong[true, guess])),
            percent(wrong[true, guess] / counts[true].sum()),
        ]
        for true, guess in pairs
        if wrong[true, guess]
    ]
    return Table(
        columns=("true", "taken for", "samples", "share of the true class"),
        rows=rows,
        caption="The commonest confusions",
    )


def _cases(
    p: NDArray[np.float64],
    y: NDArray[np.float64],
    classes: Sequence[str],
    names: Sequence[str],
    load: Load,
) -> Gallery:
    guess, sure = p.argmax(axis=1), p.max(axis=1)
    labelled = np.isfinite(y)
    wrong = labelled & (guess != y)
    # Without mistakes the least sure answers are what there is to see.
    score = np.where(wrong, sure, np.nan) if wrong.any() else np.where(labelled, -sure, np.nan)
    items = []
    for index in worst(score):
        strip, name = strip_of(index, names, load)
        # Names stand last, so that one written right to left turns nothing after it.
        answer = f"predicted ({percent(sure[index])}): {shorten(classes[guess[index]], 40)}"
        items.append((strip, f"{name}\n{answer}\ntrue: {shorten(classes[int(y[index])], 40)}"))
    title = "The surest mistakes" if wrong.any() else "No mistakes; the least sure answers"
    return picture_grid(items, title)
