"""Figures of parity: signal-to-quantisation-noise ratio, cosine and largest error."""

from collections.abc import Callable

import numpy as np

MAX_DB = 200.0
"""What equal arrays score: JSON has no infinity."""


def sqnr_db(reference: np.ndarray, actual: np.ndarray) -> float:
    """10·log10(Σ reference² / Σ (actual − reference)²), at most ``MAX_DB``; −inf becomes −MAX_DB.

    What cannot be compared scores −MAX_DB: misshapen, empty, or not finite on either side.
    """
    reference = np.asarray(reference, np.float64)
    actual = np.asarray(actual, np.float64)
    if not _comparable(reference, actual):
        return -MAX_DB
    noise = float(((actual - reference) ** 2).sum())
    signal = float((reference**2).sum())
    if noise == 0:
        return MAX_DB
    if signal == 0:
        return -MAX_DB
    return float(np.clip(10 * np.log10(signal / noise), -MAX_DB, MAX_DB))


def cosine(reference: np.ndarray, actual: np.ndarray) -> float:
    """Cosine of the angle between two arrays as vectors; −1 where they cannot be compared."""
    reference = np.asarray(reference, np.float64).reshape(-1)
    actual = np.asarray(actual, np.float64).reshape(-1)
    if not _comparable(reference, actual):
        return -1.0
    if np.array_equal(reference, actual):
        return 1.0
    length = float(np.linalg.norm(reference) * np.linalg.norm(actual))
    return float(np.clip(reference @ actual / length, -1, 1)) if length else -1.0


def largest_difference(reference: np.ndarray, actual: np.ndarray) -> float:
    """Largest absolute difference of two comparable arrays."""
    return float(np.abs(actual - reference).max())


def max_error(
    reference: np.ndarray,
    actual: np.ndarray,
    measure: Callable[[np.ndarray, np.ndarray], float] = largest_difference,
) -> float:
    """Measure how far values are off; 1e30 where they cannot be compared, as in ``sqnr_db``.

    Args:
        reference: (samples, …).
        actual: the same shape.
        measure: called with both as float64, finite and of one shape.
    """
    reference = np.asarray(reference, np.float64)
    actual = np.asarray(actual, np.float64)
    if not _comparable(reference, actual):
        return 1e30
    return measure(reference, actual)


def _comparable(reference: np.ndarray, actual: np.ndarray) -> bool:
    return (
        reference.shape == actual.shape
        and reference.size > 0
        and bool(np.isfinite(reference).all() and np.isfinite(actual).all())
    )
