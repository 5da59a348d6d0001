"""Figures over seeds: mean and spread, paired differences, and how steady single values are.

Seeds are the units here. They vary what chance does in training (first weights, order, dropout);
the test samples are the same, so nothing here says how far figures carry over to other people.
"""

import math
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from dinotrain.errors import ShapeError

CONFIDENCE = 0.95


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Mean and sample standard deviation (n − 1) over seeds; None where seeds are too few."""

    mean: float | None
    std: float | None
    seeds: int


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Mean difference to a reference over the same seeds, by a paired t-test.

    ``low`` and ``high`` end its 95 % interval, ``p`` is two-sided; None where fewer than two seeds
    are shared or all differences are equal.
    """

    mean: float | None
    low: float | None
    high: float | None
    p: float | None
    seeds: int


class Steadiness(msgspec.Struct, frozen=True, kw_only=True):
    """How much one sample's value moves from seed to seed.

    ``std`` is the root of the variance over seeds, averaged over samples, in the values' unit.
    ``change`` is that variance against the reference's, −0.2 being 20 % less; ``low`` and ``high``
    are its smallest and largest value when any one seed is left out. None where undefined.
    """

    std: float | None
    change: float | None
    low: float | None
    high: float | None


def spread(values: Sequence[float | None]) -> Spread:
    """Return mean and standard deviation of the runs that have a figure."""
    known = np.array([value for value in values if value is not None], np.float64)
    return Spread(
        mean=float(known.mean()) if len(known) else None,
        std=float(known.std(ddof=1)) if len(known) > 1 else None,
        seeds=len(known),
    )


def compare(values: Sequence[float | None], reference: Sequence[float | None]) -> Difference:
    """Compare figures of the same seeds, pair by pair.

    Args:
        values: one per seed.
        reference: the same seeds in the same order.

    Raises:
        ShapeError: lengths differ.
    """
    if len(values) != len(reference):
        raise ShapeError(
            f"{len(values)} figures and {len(reference)} of the reference cannot be paired; give "
            "one of each per seed"
        )
    from scipy import stats

    pairs = [(a, b) for a, b in zip(values, reference, strict=True) if None not in (a, b)]
    moved = np.array([a - b for a, b in pairs if a is not None and b is not None], np.float64)
    mean = float(moved.mean()) if len(moved) else None
    if len(moved) < 2 or not np.ptp(moved):
        return Difference(mean=mean, low=None, high=None, p=None, seeds=len(moved))
    test = stats.ttest_1samp(moved, 0.0)
    ends = test.confidence_interval(CONFIDENCE)
    return Difference(
        mean=mean,
        low=float(ends.low),
        high=float(ends.high),
        p=float(test.pvalue),  # type: ignore[attr-defined]
        seeds=len(moved),
    )


def steadiness(values: NDArray[np.float64], reference: NDArray[np.float64]) -> Steadiness:
    """Measure how much values move from seed to seed, beside a reference.

    Args:
        values: (seeds, samples), predictions; samples with NaN in any seed do not count.
        reference: the same of the reference, seeds and samples in the same order.

    Raises:
        ShapeError: the two are not matrices of one shape.
    """
    if values.ndim != 2 or values.shape != reference.shape:
        raise ShapeError(f"values {values.shape} and reference {reference.shape} must be alike")
    own, base = _variance(values), _variance(reference)
    seeds = range(len(values))
    without = [
        _change(_variance(np.delete(values, s, 0)), _variance(np.delete(reference, s, 0)))
        for s in seeds
    ]
    known = [change for change in without if change is not None]
    whole = len(known) == len(without) and known
    return Steadiness(
        std=math.sqrt(own) if own is not None else None,
        change=_change(own, base),
        low=min(known) if whole else None,
        high=max(known) if whole else None,
    )


def _variance(values: NDArray[np.float64]) -> float | None:
    if len(values) < 2:
        return None
    kept = values[:, np.isfinite(values).all(axis=0)]
    return float(kept.var(axis=0, ddof=1).mean()) if kept.shape[1] else None


def _change(own: float | None, base: float | None) -> float | None:
    return own / base - 1 if own is not None and base else None
