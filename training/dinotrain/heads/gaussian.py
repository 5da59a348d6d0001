"""Gaussian members: heads that give a mean and a variance per target, and their mixture.

Any head of width ``WIDTH`` is such a head, its encoding is ``gaussian``; it is trained with
``gaussian_nll``, and ``MeasureDecoder`` turns it into units. Source: METHODS B6.
"""

from torch import Tensor

from dinotrain.errors import ShapeError

WIDTH = 2
"""Numbers per target: mean and logarithm of the variance, both of z-scores."""

MIN_VARIANCE = 1e-6
"""Of z-scores. Keeps the loss finite where a member fits its labels exactly; a thousandth of the
labels' standard deviation, far below what any label resolves."""


def split_members(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Split what members output into means and variances.

    Args:
        logits: (..., 2), mean and log σ², of z-scores.

    Returns:
        (...) means and (...) variances, float32; variances are at least ``MIN_VARIANCE``.

    Raises:
        ShapeError: the last axis is not 2.
    """
    if logits.shape[-1] != WIDTH:
        raise ShapeError(
            f"logits have {logits.shape[-1]} numbers per target, a Gaussian member gives {WIDTH}"
        )
    logits = logits.float()
    return logits[..., 0], logits[..., 1].exp() + MIN_VARIANCE


def mix(means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the mixture of members that weigh the same.

    Args:
        means: (B, members, targets).
        variances: (B, members, targets).

    Returns:
        (B, targets) each. The variance is the members' own plus what they disagree on: the same
        as mean(σ² + μ²) − μ̄², which would lose its digits where μ is much larger than σ.
    """
    mean = means.mean(dim=1)
    spread = (means - mean.unsqueeze(1)).square().mean(dim=1)
    return mean, variances.mean(dim=1) + spread
