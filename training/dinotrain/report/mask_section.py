"""The section of a task that gives masks: overlap, found defects, outlines, worst pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinotrain.data.masks import IGNORE
from dinotrain.errors import ShapeError
from dinotrain.metrics import segmentation
from dinotrain.report.cases import Load, check_rows, load_or_say, worst
from dinotrain.report.class_plots import confusion_matrix
from dinotrain.report.page import Gallery, Section, Table
from dinotrain.report.pictures import (
    MASK_PANEL_PX,
    mask_legend,
    mask_overlay,
    picture_grid,
    side_by_side,
)
from dinotrain.report.text import NOTHING, count, number, percent, shorten

Masks = NDArray[np.uint8]

TYPICAL = 3


def mask_section(
    predicted: Masks,
    true: Masks,
    classes: Sequence[str],
    names: Sequence[str],
    load: Load,
    metrics: Mapping[str, Any],
    background: int | None = 0,
) -> Section:
    """Describe predicted masks beside the true ones.

    Args:
        predicted: (n, H, W), class ids.
        true: (n, H, W), class ids and 255 for pixels that do not count.
        classes: names, in the order of their ids.
        names: (n,), of the samples.
        load: gives the pictures of a sample, (H, W, 3); the first one is drawn on.
        metrics: what ``SegmentationMeter.result`` gives.
        background: the class that is not tinted, or None.

    Raises:
        ShapeError: the arrays do not fit each other.
        DataError: a mask holds a value that is no class.
    """
    check_rows("true", len(true), names)
    if predicted.shape != true.shape or true.ndim != 3:
        raise ShapeError(f"predicted {predicted.shape} and true {true.shape} must be (n, H, W)")
    shown = _Shown(predicted, true, classes, names, load, background)
    scores = np.array([_score(p, t, len(classes)) for p, t in zip(predicted, true, strict=True)])
    order = worst(-scores, limit=len(scores))
    bad = order[: len(order) // 2 + 1][:6]
    middle = [index for index in order[len(order) // 2 :] if index not in bad][:TYPICAL]
    figures = [confusion_matrix(metrics["confusion"], classes, what="pixels")]
    galleries = [
        shown.gallery(rows, scores, f"{title}: picture, true mask, predicted mask")
        for title, rows in (("The worst pictures", bad), ("Typical pictures", middle))
        if rows
    ]
    return Section(
        title="Masks",
        text="A model must beat the answer that needs no picture: the commonest class "
        "everywhere. Means run over the classes that occur.",
        tables=[_overall(metrics), _per_class(metrics)],
        figures=[*figures, *galleries],
    )


class _Shown:
    """What is needed to draw one picture with both of its masks."""

    def __init__(
        self,
        predicted: Masks,
        true: Masks,
        classes: Sequence[str],
        names: Sequence[str],
        load: Load,
        background: int | None,
    ) -> None:
        self.predicted, self.true, self.classes = predicted, true, classes
        self.names, self.load, self.background = names, load, background

    def gallery(self, rows: Sequence[int], scores: NDArray[np.float64], caption: str) -> Gallery:
        ignored = bool((self.true[list(rows)] == IGNORE).any())
        legend = mask_legend(self.classes, self.background, ignored)
        items = [self._item(index, scores[index]) for index in rows]
        return picture_grid(items, caption, legend)

    def _item(self, index: int, score: float) -> tuple[Image.Image, str]:
        images, name = load_or_say(index, self.names, self.load)
        shape = (*self.true[index].shape, 3)
        pixels = next(iter(images.values()), np.full(shape, 128, np.uint8))
        panels = [pixels] + [
            mask_overlay(pixels, mask, self.classes, background=self.background)
            for mask in (self.true[index], self.predicted[index])
        ]
        return side_by_side(panels, MASK_PANEL_PX), f"{name}\nmean IoU {number(score)}"


def _score(predicted: Masks, true: Masks, classes: int) -> float:
    """Mean IoU of one picture over the classes in it; NaN where nothing counts."""
    iou, _ = segmentation.overlap(segmentation.confusion_matrix(predicted, true, classes))
    known = [value for value in iou if value is not None]
    return sum(known) / len(known) if known else float("nan")


def _overall(metrics: Mapping[str, Any]) -> Table:
    base = metrics["majority_predictor"]
    keys = ("pixel_accuracy", "mean_iou", "mean_dice", "mean_bt_iou")
    return Table(
        columns=(
            "answer",
            "pixel accuracy",
            "mean IoU",
            "mean Dice",
            f"mean IoU within {metrics['tolerance_px']:g} px",
        ),
        rows=[
            ["model", percent(metrics[keys[0]]), *(number(metrics[key]) for key in keys[1:])],
            [
                f"always {shorten(base['class'], 40)}",
                percent(base["pixel_accuracy"]),
                number(base["mean_iou"]),
                NOTHING,
                NOTHING,
            ],
        ],
        caption=f"{count(metrics['images'])} pictures, {count(metrics['pixels'])} labelled pixels",
        quiet=[1],
    )


def _per_class(metrics: Mapping[str, Any]) -> Table:
    rows, total = [], max(metrics["pixels"], 1)
    for name, row in metrics["classes"].items():
        rows.append(
            [
                shorten(name, 70),
                percent(row["pixels"] / total, 2),
                *(number(row[key]) for key in ("iou", "dice", "bt_iou")),
                _of(row["detection_rate"], row["instances"]),
                _of(row["detection_precision"], row["predicted_instances"]),
                number(row["surface_distance_px"], 2),
                number(row["bf1"]),
            ]
        )
    tolerance = f"{metrics['tolerance_px']:g} px"
    return Table(
        columns=(
            "class",
            "share of pixels",
            "IoU",
            "Dice",
            f"IoU within {tolerance}",
            "found, of true instances",
            "right, of predicted instances",
            "outline distance, px",
            f"outline F1 within {tolerance}",
        ),
        rows=rows,
        caption="Per class",
    )


def _of(share: float | None, whole: float | None) -> str:
    if whole is None:
        return NOTHING
    return f"{percent(share, 0)} of {count(int(whole))}" if whole else NOTHING
