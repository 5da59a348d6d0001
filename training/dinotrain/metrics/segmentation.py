"""Agreement between predicted and true masks: what a segmentation run reports.

Overlap is counted over all pixels of the set, instances and boundaries picture by picture with
SciPy's ``ndimage``; torchmetrics has neither the tolerant overlap nor the instances, and its mean
overlap treats absent classes otherwise. Source: METHODS C, Metrics.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dinotrain.data.masks import IGNORE
from dinotrain.errors import DataError, ShapeError

Plane = NDArray[np.bool_]
"""(H, W), True where a pixel belongs to one class."""

_CROSS = ndimage.generate_binary_structure(2, 1)
_EIGHT = ndimage.generate_binary_structure(2, 2)


class SegmentationRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What counts as near, as an instance and as found."""

    tolerance_px: float = 3.0
    """Largest Euclidean distance at which two outlines count as the same."""
    min_instance_px: int = 10
    """Components below this size are no instances, neither true nor predicted."""
    min_cover: float = 0.5
    """Least part of an instance that the other mask covers where it counts as found."""
    background: int | None = 0
    """Class without instances and outlines; None where every class has them."""


class ShapeCounts(msgspec.Struct, frozen=True):
    """What instances and outlines of one class add up to; counts of several pictures are added."""

    near: float = 0
    """Pixels of either mask that lie within the tolerance of the other."""
    union: float = 0
    true: float = 0
    """True instances."""
    found: float = 0
    predicted: float = 0
    """Predicted instances."""
    right: float = 0
    true_edge: float = 0
    """Pixels on the true outline."""
    true_edge_near: float = 0
    predicted_edge: float = 0
    predicted_edge_near: float = 0
    distance_px: float = 0
    """Sum over pictures of the symmetric mean surface distance."""
    both: float = 0
    """Pictures that have an outline in both masks."""
    one_sided: float = 0
    """Pictures that have an outline in one mask only: no distance can be given."""

    def __add__(self, other: "ShapeCounts") -> "ShapeCounts":
        """Return the sums, field by field."""
        pairs = zip(msgspec.structs.astuple(self), msgspec.structs.astuple(other), strict=True)
        return ShapeCounts(*(a + b for a, b in pairs))


class SegmentationMeter:
    """Adds up pictures of any size; meters of several processes can be merged.

    Args:
        classes: names, in the order of their ids.
        rules: tolerances.
    """

    def __init__(self, classes: Sequence[str], rules: SegmentationRules | None = None) -> None:
        self.classes = tuple(classes)
        self.rules = rules or SegmentationRules()
        self.images = 0
        self.confusion = np.zeros((len(self.classes), len(self.classes)), dtype=np.int64)
        self.shapes = [ShapeCounts() for _ in self.classes]

    def add(self, predicted: NDArray[np.integer], true: NDArray[np.integer]) -> None:
        """Judge one picture.

        Args:
            predicted: (H, W), class ids.
            true: (H, W), class ids and 255 for pixels that do not count.

        Raises:
            ShapeError: the two differ in size, or are no planes.
            DataError: a value is no class.
        """
        self.confusion += confusion_matrix(predicted, true, len(self.classes))
        self.images += 1
        valid = true != IGNORE
        for number in range(len(self.classes)):
            if number != self.rules.background:
                p, g = (predicted == number) & valid, true == number
                self.shapes[number] += measure_shapes(p, g, valid, self.rules)

    def merge(self, other: "SegmentationMeter") -> None:
        """Add what another meter of the same classes and rules has seen."""
        self.images += other.images
        self.confusion += other.confusion
        self.shapes = [a + b for a, b in zip(self.shapes, other.shapes, strict=True)]

    def result(self, majority: int | None = None) -> dict[str, Any]:
        """Return all figures; None stands where a figure is undefined.

        Args:
            majority: id of the class that a model without pictures answers everywhere, from the
                training masks; the commonest true class where None.

        Returns:
            {images, pixels, tolerance_px, pixel_accuracy, mean_iou, mean_dice, mean_bt_iou,
            majority_predictor: {class, pixel_accuracy, mean_iou}, confusion: rows true, columns
            predicted, classes: {name: {pixels, predicted_pixels, iou, dice, bt_iou, instances,
            detection_rate, predicted_instances, detection_precision, surface_distance_px,
            surface_images, one_sided_images, bf1}}}. Means run over the classes with a non-empty
            union, the mean of ``bt_iou`` over those without the background. The majority predictor
            is what a model must beat.
        """
        iou, dice = overlap(self.confusion)
        total = int(self.confusion.sum())
        rows = {}
        for number, name in enumerate(self.classes):
            rows[name] = {
                "pixels": int(self.confusion[number].sum()),
                "predicted_pixels": int(self.confusion[:, number].sum()),
                "iou": iou[number],
                "dice": dice[number],
                **_describe_shapes(self.shapes[number], number == self.rules.background),
            }
        return {
            "images": self.images,
            "pixels": total,
            "tolerance_px": self.rules.tolerance_px,
            "pixel_accuracy": _ratio(float(np.trace(self.confusion)), total),
            "mean_iou": _mean(iou),
            "mean_dice": _mean(dice),
            "mean_bt_iou": _mean([row["bt_iou"] for row in rows.values()]),
            "majority_predictor": self._majority(majority),
            "confusion": self.confusion.tolist(),
            "classes": rows,
        }

    def _majority(self, number: int | None) -> dict[str, Any]:
        true = self.confusion.sum(axis=1)
        best = int(true.argmax()) if number is None else number
        guess = np.zeros_like(self.confusion)
        guess[:, best] = true
        return {
            "class": self.classes[best],
            "pixel_accuracy": _ratio(float(true[best]), float(true.sum())),
            "mean_iou": _mean(overlap(guess)[0]),
        }


def confusion_matrix(
    predicted: NDArray[np.integer], true: NDArray[np.integer], classes: int
) -> NDArray[np.int64]:
    """Count pixels by true and by predicted class; pixels of 255 in ``true`` do not count.

    Args:
        predicted: (H, W), 0 to classes − 1.
        true: (H, W), 0 to classes − 1, or 255.
        classes: how many there are.

    Returns:
        (classes, classes), rows true, columns predicted.

    Raises:
        ShapeError: the two differ in size, or are no planes.
        DataError: a value is no class.
    """
    if predicted.shape != true.shape or true.ndim != 2:
        raise ShapeError(
            f"predicted {predicted.shape} and true {true.shape} must be two planes of one size"
        )
    valid = true != IGNORE
    p, g = predicted[valid].astype(np.int64), true[valid].astype(np.int64)
    for name, values in (("predicted", p), ("true", g)):
        if values.size and not 0 <= values.min() <= values.max() < classes:
            raise DataError(
                f"the {name} mask holds {values.min()} to {values.max()}; classes are 0 to "
                f"{classes - 1}, and {IGNORE} in a true mask means ignore"
            )
    return np.bincount(g * classes + p, minlength=classes**2).reshape(classes, classes)


def overlap(
    confusion: NDArray[np.integer],
) -> tuple[list[float | None], list[float | None]]:
    """Return IoU and Dice per class; None where neither mask has the class.

    Args:
        confusion: (classes, classes), rows true, columns predicted.
    """
    both = np.diag(confusion).astype(np.float64)
    true, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    iou = [_ratio(b, t + p - b) for b, t, p in zip(both, true, predicted, strict=True)]
    dice = [_ratio(2 * b, t + p) for b, t, p in zip(both, true, predicted, strict=True)]
    return iou, dice


def measure_shapes(
    predicted: Plane, true: Plane, valid: Plane, rules: SegmentationRules
) -> ShapeCounts:
    """Compare one class in one picture: tolerant overlap, instances, outlines.

    Args:
        predicted: (H, W), False outside ``valid``.
        true: (H, W), False outside ``valid``.
        valid: (H, W), where there is a label.
        rules: tolerances.

    Source: METHODS C. BT-IoU(τ) = |(P∩dil_τG)∪(G∩dil_τP)| / |P∪G|.
    """
    union = predicted | true
    if not union.any():
        return ShapeCounts()
    edges = outline(predicted, valid), outline(true, valid)
    # All pixels of both masks lie in this box, so that distances inside it are exact.
    box = ndimage.find_objects(union.astype(np.uint8))[0]
    p, g = predicted[box], true[box]
    far = rules.tolerance_px
    near = (p & (_distance_to(g) <= far)) | (g & (_distance_to(p) <= far))
    found, wanted = count_covered(g, p, rules)
    right, given = count_covered(p, g, rules)
    return ShapeCounts(
        near=int(near.sum()),
        union=int(union.sum()),
        true=wanted,
        found=found,
        predicted=given,
        right=right,
    ) + _compare_outlines(edges[0][box], edges[1][box], far)


def count_covered(mask: Plane, other: Plane, rules: SegmentationRules) -> tuple[int, int]:
    """Count the 8-connected components of ``mask`` that ``other`` covers well enough.

    Returns:
        How many are covered, and how many there are.
    """
    labels, _ = ndimage.label(mask, structure=_EIGHT)  # type: ignore[misc]
    sizes = np.bincount(labels.ravel())[1:]
    covered = np.bincount(labels[other], minlength=len(sizes) + 1)[1:]
    large = sizes >= rules.min_instance_px
    return int((large & (covered >= rules.min_cover * sizes)).sum()), int(large.sum())


def outline(mask: Plane, valid: Plane) -> Plane:
    """Return the mask's pixels with one of the 4 neighbours outside of it.

    Neighbours beyond the picture or without a label are unknown and make no outline.
    """
    inner = ndimage.binary_erosion(mask | ~valid, structure=_CROSS, border_value=1)
    return mask & ~np.asarray(inner, dtype=np.bool_)


def _compare_outlines(predicted: Plane, true: Plane, far: float) -> ShapeCounts:
    to_true, to_predicted = _distance_to(true)[predicted], _distance_to(predicted)[true]
    count = len(to_true) + len(to_predicted)
    both = len(to_true) > 0 and len(to_predicted) > 0
    return ShapeCounts(
        true_edge=len(to_predicted),
        true_edge_near=int((to_predicted <= far).sum()),
        predicted_edge=len(to_true),
        predicted_edge_near=int((to_true <= far).sum()),
        distance_px=float(to_true.sum() + to_predicted.sum()) / count if both else 0.0,
        both=int(both),
        one_sided=int(count > 0 and not both),
    )


def _distance_to(mask: Plane) -> NDArray[np.float64]:
    """Euclidean distance in pixels to the nearest pixel of the mask; infinite without any."""
    if not mask.any():
        return np.full(mask.shape, np.inf)
    return np.asarray(ndimage.distance_transform_edt(~mask))


def _describe_shapes(counts: ShapeCounts, background: bool) -> dict[str, float | None]:
    precision = _ratio(counts.predicted_edge_near, counts.predicted_edge) or 0.0
    recall = _ratio(counts.true_edge_near, counts.true_edge) or 0.0
    seen = counts.true_edge + counts.predicted_edge > 0
    either = precision + recall
    bf1 = (2 * precision * recall / either if either else 0.0) if seen else None
    figures: dict[str, float | None] = {
        "bt_iou": _ratio(counts.near, counts.union),
        "instances": counts.true,
        "detection_rate": _ratio(counts.found, counts.true),
        "predicted_instances": counts.predicted,
        "detection_precision": _ratio(counts.right, counts.predicted),
        "surface_distance_px": _ratio(counts.distance_px, counts.both),
        "surface_images": counts.both,
        "one_sided_images": counts.one_sided,
        "bf1": bf1,
    }
    return dict.fromkeys(figures) if background else figures


def _ratio(part: float, whole: float) -> float | None:
    return float(part) / float(whole) if whole else None


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None
