"""How far stated uncertainties can be believed, and intervals that hold. Source: METHODS B8.

``regression`` judges the values themselves; this module judges the standard deviations and the bit
probabilities beside them, and widens intervals until they hold on held-out subjects.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri

from dinotrain.errors import DataError, ShapeError, UsageError
from dinotrain.tasks.base import TargetSpec

Values = NDArray[np.float64]

NOMINAL = tuple(round(0.1 * tenth, 1) for tenth in range(1, 10))
"""Coverages at which calibration is judged."""

ECE_BINS = 15


def gaussian_crps(predicted: ArrayLike, std: ArrayLike, true: ArrayLike) -> Values:
    """Continuous ranked probability score of normal forecasts: σ[z(2Φ(z) − 1) + 2φ(z) − π^-½].

    Args:
        predicted: means, any shape.
        std: standard deviations, 0 or above; 0 gives the absolute error.
        true: what happened; NaN gives NaN.

    Returns:
        The score of each, in the unit of the values; lower is better.
    """
    predicted, std, true = _arrays(predicted, std, true)
    error = true - predicted
    scale = np.where(std > 0, std, 1.0)
    z = error / scale
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    score = scale * (z * (2 * ndtr(z) - 1) + 2 * density - 1 / math.sqrt(math.pi))
    return np.where(std > 0, score, np.abs(error))


def coverage_curve(
    predicted: ArrayLike, std: ArrayLike, true: ArrayLike, nominal: Sequence[float] = NOMINAL
) -> Values:
    """Share of true values inside the central normal interval of each nominal coverage.

    Args:
        predicted: (n,) means.
        std: (n,) standard deviations, 0 or above.
        true: (n,); rows with NaN do not count.
        nominal: coverages, between 0 and 1.

    Returns:
        (len(nominal),); NaN where no row counts.
    """
    predicted, std, true = _arrays(predicted, std, true)
    labelled = ~np.isnan(true)
    if not labelled.any():
        return np.full(len(nominal), np.nan)
    error = np.abs(true - predicted)[labelled]
    half_widths = ndtri((1 + np.asarray(nominal)) / 2)
    return (error <= half_widths[:, None] * std[labelled]).mean(axis=1)


def calibration_error(
    predicted: ArrayLike, std: ArrayLike, true: ArrayLike, nominal: Sequence[float] = NOMINAL
) -> float | None:
    """Mean |nominal − empirical coverage|; None without rows. See ``coverage_curve``."""
    empirical = coverage_curve(predicted, std, true, nominal)
    if np.isnan(empirical).any():
        return None
    return float(np.abs(np.asarray(nominal) - empirical).mean())


def bit_calibration_error(
    probabilities: ArrayLike, bits: ArrayLike, bins: int = ECE_BINS
) -> Values:
    """Expected calibration error of each bit: Σ_bins share · |mean probability − share of ones|.

    Args:
        probabilities: (n, bits), of a 1.
        bits: (n, bits), 0 or 1; rows with NaN do not count for that bit.
        bins: of equal width over [0, 1].

    Returns:
        (bits,), between 0 and 1; NaN for a bit without rows.

    Raises:
        ShapeError: the arrays differ in shape or are not of two dimensions.
    """
    p, b = np.asarray(probabilities, np.float64), np.asarray(bits, np.float64)
    if p.ndim != 2 or p.shape != b.shape:
        raise ShapeError(
            f"probabilities {p.shape} and bits {b.shape} must both be (rows, bits) of one shape"
        )
    errors = np.full(p.shape[1], np.nan)
    for column in range(p.shape[1]):
        counted = ~np.isnan(b[:, column])
        if not counted.any():
            continue
        guess, bit = p[counted, column], b[counted, column]
        # 1 belongs to the last bin.
        place = np.clip((guess * bins).astype(int), 0, bins - 1)
        gap = np.bincount(place, weights=guess - bit, minlength=bins)
        errors[column] = np.abs(gap).sum() / len(guess)
    return errors


class ConformalFactor(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An interval ŷ ± factor·σ̂ that covers all values of a new subject with ``coverage``.

    Where it was made without σ̂, that is 1, and ``factor`` is a half width in the values' unit.
    """

    factor: float
    coverage: float
    subjects: int


def conformal_factor(
    predicted: ArrayLike,
    true: ArrayLike,
    subjects: Sequence[Hashable],
    coverage: float = 0.9,
    std: ArrayLike | None = None,
) -> ConformalFactor:
    """Split conformal: the ⌈(n + 1)·coverage⌉-th smallest score of n subjects held out for it.

    A subject's score is the largest |y − ŷ|/σ̂ of its rows, so that rows of one person, which are
    alike, do not count as independent. Neither training nor model choice may have seen these
    subjects; the coverage then holds on average over draws of them, for any model.

    Args:
        predicted: (n,), one target.
        true: (n,); rows with NaN do not count.
        subjects: (n,), who each row is of.
        coverage: 1 − α, between 0 and 1.
        std: (n,), above 0; 1 where None.

    Returns:
        The factor.

    Raises:
        UsageError: ``coverage`` is not between 0 and 1.
        ShapeError: lengths differ.
        DataError: too few subjects for the coverage, or a standard deviation is not above 0, or a
            prediction is not a number.
    """
    if not 0 < coverage < 1:
        raise UsageError(f"coverage is {coverage}; between 0 and 1 is accepted, such as 0.9")
    predicted, true = np.asarray(predicted, np.float64), np.asarray(true, np.float64)
    scale = np.ones_like(true) if std is None else np.asarray(std, np.float64)
    shapes = {predicted.shape, true.shape, scale.shape, (len(subjects),)}
    if shapes != {(len(subjects),)}:
        raise ShapeError(
            f"predicted {predicted.shape}, true {true.shape}, std {scale.shape} and "
            f"{len(subjects)} subjects must be one row each"
        )
    scores: dict[Hashable, float] = {}
    for row in np.flatnonzero(~np.isnan(true)):
        score = abs(true[row] - predicted[row]) / scale[row] if scale[row] > 0 else math.nan
        if not math.isfinite(score):
            raise DataError(
                f"calibration row {row} has the prediction {predicted[row]} ± {scale[row]}; "
                "predictions are finite and standard deviations above 0"
            )
        scores[subjects[row]] = max(scores.get(subjects[row], 0.0), float(score))
    # A product such as 10 · 0.9 may lie a rounding above the whole number that it is.
    rank = math.ceil((len(scores) + 1) * coverage - 1e-9)
    if rank > len(scores):
        needed = math.ceil(coverage / (1 - coverage) - 1e-9)
        raise DataError(
            f"{len(scores)} labelled subjects cannot calibrate {coverage:.4g} coverage; it needs "
            f"{needed}. Hold out more subjects, or ask for less."
        )
    return ConformalFactor(
        factor=sorted(scores.values())[rank - 1], coverage=coverage, subjects=len(scores)
    )


def interval_coverage(
    low: ArrayLike, high: ArrayLike, true: ArrayLike, subjects: Sequence[Hashable]
) -> dict[str, float | int | None]:
    """How often intervals hold.

    Args:
        low: (n,), lower ends of one target.
        high: (n,), upper ends.
        true: (n,); rows with NaN do not count.
        subjects: (n,), who each row is of.

    Returns:
        {n, subjects, rows_covered, subjects_covered, mean_width}: shares between 0 and 1; a subject
        is covered where all its rows are, which is what ``conformal_factor`` promises. None stands
        where there is no label.

    Raises:
        ShapeError: lengths differ.
    """
    low, high, true = (np.asarray(values, np.float64) for values in (low, high, true))
    if {low.shape, high.shape, true.shape} != {(len(subjects),)}:
        raise ShapeError(
            f"low {low.shape}, high {high.shape}, true {true.shape} and {len(subjects)} subjects "
            "must be one row each"
        )
    inside = (low <= true) & (true <= high)
    covered: dict[Hashable, bool] = {}
    rows = np.flatnonzero(~np.isnan(true))
    for row in rows:
        covered[subjects[row]] = covered.get(subjects[row], True) and bool(inside[row])
    counted = len(rows) > 0
    return {
        "n": len(rows),
        "subjects": len(covered),
        "rows_covered": float(inside[rows].mean()) if counted else None,
        "subjects_covered": sum(covered.values()) / len(covered) if counted else None,
        "mean_width": float((high - low)[rows].mean()) if counted else None,
    }


def evaluate_uncertainty(
    predicted: ArrayLike, std: ArrayLike, true: ArrayLike, targets: Sequence[TargetSpec]
) -> dict[str, Any]:
    """Judge stated standard deviations per target; rows without a label do not count.

    Args:
        predicted: (n, targets), in the targets' units.
        std: (n, targets), 0 or above.
        true: (n, targets), NaN where there is no label.
        targets: names and units of the columns.

    Returns:
        {output name: {n, crps_mm, mean_std_mm (the sharpness), calibration_error,
        coverage_curve: {nominal: [...], empirical: [...]}}} with the target's own unit; None
        stands where there is no label.

    Raises:
        ShapeError: the arrays do not have one column per target, or differ in length.
    """
    predicted, std, true = _arrays(predicted, std, true)
    if true.ndim != 2 or true.shape[1] != len(targets):
        raise ShapeError(f"values {true.shape} must have {len(targets)} columns, one per target")
    result = {}
    for column, target in enumerate(targets):
        kept = ~np.isnan(true[:, column])
        y, guess, sigma = true[kept, column], predicted[kept, column], std[kept, column]
        empirical = coverage_curve(guess, sigma, y)
        result[target.output_name] = {
            "n": len(y),
            f"crps_{target.unit}": float(gaussian_crps(guess, sigma, y).mean()) if len(y) else None,
            f"mean_std_{target.unit}": float(sigma.mean()) if len(y) else None,
            "calibration_error": calibration_error(guess, sigma, y),
            "coverage_curve": {
                "nominal": list(NOMINAL),
                "empirical": [float(share) if len(y) else None for share in empirical],
            },
        }
    return result


def evaluate_intervals(
    low: ArrayLike,
    high: ArrayLike,
    true: ArrayLike,
    targets: Sequence[TargetSpec],
    subjects: Sequence[Hashable] = (),
) -> dict[str, Any]:
    """Judge intervals per target; rows without a label do not count.

    Args:
        low: (n, targets), lower ends.
        high: (n, targets), upper ends.
        true: (n, targets), NaN where there is no label.
        targets: names and units of the columns.
        subjects: (n,), who each row is of; nothing leaves out what is counted by subject.

    Returns:
        {output name: {interval_rows_covered, interval_subjects_covered, interval_width_mm}}, shares
        between 0 and 1, see ``interval_coverage``, and the target's own unit.

    Raises:
        ShapeError: the arrays do not have one column per target, or differ in length.
    """
    low, high, true = (np.asarray(values, np.float64) for values in (low, high, true))
    if {low.shape, high.shape, true.shape} != {(len(true), len(targets))}:
        raise ShapeError(
            f"low {low.shape}, high {high.shape} and true {true.shape} must have one row each and "
            f"{len(targets)} columns, one per target"
        )
    result = {}
    for column, target in enumerate(targets):
        people = subjects if len(subjects) else range(len(true))
        found = interval_coverage(low[:, column], high[:, column], true[:, column], people)
        row = {"interval_rows_covered": found["rows_covered"]}
        if len(subjects):
            row["interval_subjects_covered"] = found["subjects_covered"]
        result[target.output_name] = row | {f"interval_width_{target.unit}": found["mean_width"]}
    return result


def _arrays(predicted: ArrayLike, std: ArrayLike, true: ArrayLike) -> tuple[Values, Values, Values]:
    arrays = tuple(np.asarray(values, np.float64) for values in (predicted, std, true))
    if len({array.shape for array in arrays}) != 1:
        raise ShapeError(
            f"predicted {arrays[0].shape}, std {arrays[1].shape} and true {arrays[2].shape} must "
            "have one shape"
        )
    if (arrays[1] < 0).any():
        raise DataError(f"a standard deviation is {arrays[1].min()}; 0 and above are accepted")
    return arrays  # type: ignore[return-value]
