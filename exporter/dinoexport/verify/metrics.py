"""Figures of parity: signal-to-quantisation-noise ratio and largest error."""

import numpy as np

MAX_DB = 200.0
"""What equal arrays score: JSON has no infinity."""


def sqnr_db(reference: np.ndarray, actual: np.ndarray) -> float:
    """10·log10(Σ reference² / Σ (actual − reference)²), at most ``MAX_DB``; −inf becomes −MAX_DB.

    A value that is not finite where the reference is scores −MAX_DB.
    """
    reference = np.asarray(reference, np.float64)
    actual = np.asarray(actual, np.float64)
    if reference.shape != actual.shape or not np.isfinite(actual).all():
        return -MAX_DB
    noise = float(((actual - reference) ** 2).sum())
    signal = float((reference**2).sum())
    if noise == 0:
        return MAX_DB
    if signal == 0:
        return -MAX_DB
    return float(np.clip(10 * np.log10(signal / noise), -MAX_DB, MAX_DB))


def max_error(reference: np.ndarray, actual: np.ndarray) -> float:
    """Largest absolute difference; 1e30 where the actual value is not finite or misshapen."""
    reference = np.asarray(reference, np.float64)
    actual = np.asarray(actual, np.float64)
    if reference.shape != actual.shape or not np.isfinite(actual).all():
        return 1e30
    return float(np.abs(actual - reference).max())
