"""From predictions on held-out subjects to the constants of intervals, after training.

Source: METHODS B8.
"""

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dinotrain.errors import DataError
from dinotrain.intervals import Intervals
from dinotrain.metrics.uncertainty import ConformalFactor, conformal_factor
from dinotrain.tasks.base import TargetSpec

Values = NDArray[np.floating]


def calibrate(
    predicted: Mapping[str, Values],
    true: Values,
    subjects: Sequence[Hashable],
    coverage: float,
    targets: Sequence[TargetSpec],
) -> tuple[Intervals | None, str]:
    """Widen intervals until they hold on held-out subjects (split conformal).

    They scale with the standard deviation σ̂ that the model states, unless it is not one of its
    errors: where some σ̂ is 0, or a factor is beyond ``largest_factor``, all are absolute.

    Members without a variance of their own agree much better with each other than with the labels
    (on rendered eyes 0.02 to 0.1 mm beside errors of 0.3 to 0.5 mm). Scaled intervals of theirs
    hold as well, but came out 1.2 to 2.5 times as wide, and their factors of 20 to 90 enlarge what
    half precision rounds.

    Args:
        predicted: {output name: (n,)}, what the model gives without intervals.
        true: (n, targets); NaN where there is no label.
        subjects: (n,), who each row is of. No one of them may have been trained on.
        coverage: 1 − α, between 0 and 1.
        targets: names of the columns.

    Returns:
        The intervals and nothing, or None and the reason: too few labelled subjects of a target.

    Raises:
        UsageError: ``coverage`` is not between 0 and 1.
        ShapeError: lengths differ.
    """
    stds = [predicted[target.std_name] for target in targets if target.std_name in predicted]
    try:
        absolute = _factors(predicted, true, subjects, coverage, targets, [None] * len(targets))
    except DataError as error:
        return None, f"no intervals: {error}"
    if len(stds) == len(targets) and all(bool((std > 0).all()) for std in stds):
        scaled = _factors(predicted, true, subjects, coverage, targets, stds)
        limit = largest_factor(coverage, max(Counter(subjects).values()))
        if all(found.factor <= limit for found in scaled):
            return _intervals("scaled", scaled), ""
    return _intervals("absolute", absolute), ""


def largest_factor(coverage: float, rows: int = 1) -> float:
    """Return how many standard deviations hold all of a subject's rows at most, whatever the law.

    By Chebyshev one row is missed by k standard deviations in 1/k² of all cases at most, so one of
    several in rows/k². More shows that they are no standard deviations of these errors.
    """
    return math.sqrt(rows / (1 - coverage))


def _factors(
    predicted: Mapping[str, Values],
    true: Values,
    subjects: Sequence[Hashable],
    coverage: float,
    targets: Sequence[TargetSpec],
    stds: Sequence[Values | None],
) -> list[ConformalFactor]:
    found = []
    for column, (target, std) in enumerate(zip(targets, stds, strict=True)):
        name = target.output_name
        try:
            factor = conformal_factor(predicted[name], true[:, column], subjects, coverage, std)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        found.append(factor)
    return found


def _intervals(method: Literal["absolute", "scaled"], found: list[ConformalFactor]) -> Intervals:
    return Intervals(
        method=method,
        coverage=found[0].coverage,
        factors=tuple(factor.factor for factor in found),
        subjects=tuple(factor.subjects for factor in found),
    )
