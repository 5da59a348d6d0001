"""Agreement between measured and true values: what a training run reports. Source: METHODS B8."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinotrain.errors import ShapeError
from dinotrain.tasks.base import TargetSpec

Values = NDArray[np.floating]

TOLERANCES = (0.5, 1.0)
"""Errors that count as close, in the targets' unit."""

AGREEMENT_95 = 1.96


def evaluate_targets(
    predicted: Values, true: Values, reference: Values, targets: Sequence[TargetSpec]
) -> dict[str, Any]:
    """Judge predictions per target; rows without a label do not count.

    Args:
        predicted: (n, targets), in the targets' units.
        true: (n, targets); NaN where there is no label.
        reference: (m, targets), the labels that were trained on, NaN where missing; their mean is
            what a model must beat.
        targets: names and units of the columns.

    Returns:
        {output name: {n, mse_mm2, mae_mm, rmse_mm, r2, pearson_r, icc_2_1, bias_mm, loa_low_mm,
        loa_high_mm, within_0_5_mm_percent, within_1_0_mm_percent, mean_predictor: {...}}}, with
        the target's own unit. Bias is predicted − true. None stands where a figure is undefined
        (too few labels, or no spread).

    Raises:
        ShapeError: the three arrays do not have one column per target, or lengths differ.
    """
    predicted, true = np.asarray(predicted, np.float64), np.asarray(true, np.float64)
    reference = np.asarray(reference, np.float64)
    widths = {array.shape[1:] for array in (predicted, true, reference)}
    if widths != {(len(targets),)} or len(predicted) != len(true):
        raise ShapeError(
            f"predicted {predicted.shape}, true {true.shape} and reference {reference.shape} must "
            f"have {len(targets)} columns, and the first two as many rows"
        )
    result = {}
    for column, target in enumerate(targets):
        labelled = ~np.isnan(true[:, column])
        y, guess = true[labelled, column], predicted[labelled, column]
        seen = reference[~np.isnan(reference[:, column]), column]
        row: dict[str, Any] = {"n": len(y), **_errors(guess, y, target.unit)}
        row |= _agreement(guess, y, target.unit)
        if len(seen):
            mean = float(seen.mean())
            row["mean_predictor"] = {
                f"value_{target.unit}": mean,
                **_errors(np.full_like(y, mean), y, target.unit),
            }
        result[target.output_name] = row
    return result


def icc_2_1(first: Values, second: Values) -> float | None:
    """Intraclass correlation ICC(2,1): two-way random effects, absolute agreement, one rating.

    Args:
        first: (n,), one rater.
        second: (n,), the other.

    Returns:
        At most 1; None for fewer than two rows, or without any spread.

    Source: Shrout & Fleiss 1979, from the mean squares of rows, columns and residual.
    """
    table = np.stack([first, second], axis=1)
    n, k = table.shape
    if n < 2:
        return None
    grand = table.mean()
    rows = k * ((table.mean(axis=1) - grand) ** 2).sum() / (n - 1)
    columns = n * ((table.mean(axis=0) - grand) ** 2).sum() / (k - 1)
    residual = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + grand
    rest = (residual**2).sum() / ((n - 1) * (k - 1))
    denominator = rows + (k - 1) * rest + k * (columns - rest) / n
    return _finite((rows - rest) / denominator) if denominator else None


def _errors(predicted: Values, true: Values, unit: str) -> dict[str, float | None]:
    names = (f"mse_{unit}2", f"rmse_{unit}", f"mae_{unit}")
    closeness = {
        limit: f"within_{limit:.1f}_{unit}_percent".replace(".", "_") for limit in TOLERANCES
    }
    if not len(true):
        return dict.fromkeys((*names, *closeness.values()))
    error = predicted - true
    mse = float((error**2).mean())
    row: dict[str, float | None] = dict(
        zip(names, (mse, mse**0.5, float(np.abs(error).mean())), strict=True)
    )
    for limit, name in closeness.items():
        row[name] = float(100 * (np.abs(error) <= limit).mean())
    return row


def _agreement(predicted: Values, true: Values, unit: str) -> dict[str, float | None]:
    names = ("r2", "pearson_r", "icc_2_1", f"bias_{unit}", f"loa_low_{unit}", f"loa_high_{unit}")
    if not len(true):
        return dict.fromkeys(names)
    error = predicted - true
    bias = float(error.mean())
    if len(true) < 2:
        return dict.fromkeys(names) | {f"bias_{unit}": bias}
    spread = float(((true - true.mean()) ** 2).sum())
    constant = spread == 0 or np.ptp(predicted) == 0
    half = AGREEMENT_95 * float(error.std(ddof=1))
    values = (
        1 - float((error**2).sum()) / spread if spread else None,
        None if constant else _finite(float(np.corrcoef(predicted, true)[0, 1])),
        icc_2_1(predicted, true),
        bias,
        bias - half,
        bias + half,
    )
    return dict(zip(names, values, strict=True))


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
