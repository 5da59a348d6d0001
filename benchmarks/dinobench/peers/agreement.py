"""Do the candidates compute the same: probabilities against PyTorch's, before anything is timed."""

import msgspec
import numpy as np

from dinobench.peers.candidates import Candidate

EXACT_LIMIT = 1e-4
"""Of float32 candidates, in probability: the classifier's own budget at fp32."""


class MismatchError(Exception):
    """A float32 candidate that is another model; nothing may be timed."""


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """How far a candidate is from PyTorch's float32."""

    worst: float
    """Largest difference of any probability."""
    sqnr_db: float
    """Of the logits less their mean, which the probabilities tell."""


def check(candidate: Candidate, found: np.ndarray, expected: np.ndarray) -> Agreement:
    """Compare a candidate's probabilities with PyTorch's; see ``compare``.

    Raises:
        MismatchError: the shapes differ, or it is float32 and further off than ``EXACT_LIMIT``.
    """
    try:
        agreement = compare(found, expected)
    except ValueError as error:
        raise MismatchError(f"{candidate.name} {error}. Nothing was timed.") from error
    if candidate.exact and agreement.worst > EXACT_LIMIT:
        raise MismatchError(
            f"{candidate.name}: its probabilities are {agreement.worst:.2g} from PyTorch's, "
            f"{EXACT_LIMIT:g} is allowed: it is another model. Nothing was timed."
        )
    return agreement


def compare(found: np.ndarray, expected: np.ndarray) -> Agreement:
    """Compare probabilities.

    Args:
        found: (N, C) float64.
        expected: (N, C) float64.

    Raises:
        ValueError: other shapes, or a value that is no number.
    """
    if found.shape != expected.shape:
        raise ValueError(f"gives {found.shape}, and {expected.shape} is expected")
    if not np.isfinite(found).all():
        raise ValueError("gives values that are no numbers")
    signal = _centred_logits(expected)
    noise = _centred_logits(found) - signal
    power = float((noise**2).sum())
    sqnr = 10 * np.log10(float((signal**2).sum()) / power) if power else float("inf")
    return Agreement(worst=float(np.abs(found - expected).max()), sqnr_db=float(sqnr))


def _centred_logits(probabilities: np.ndarray) -> np.ndarray:
    logits = np.log(np.clip(probabilities, 1e-12, 1))
    return logits - logits.mean(axis=1, keepdims=True)
