"""Losses on scalar outputs, all on z-scored targets. Source: METHODS B5, B6."""

from torch import Tensor

from dinotrain.errors import UsageError
from dinotrain.heads.gaussian import split_members
from dinotrain.losses.bits import masked_mean

FOCAL_BETA = 0.2


def mse(logits: Tensor, values: Tensor, mask: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Squared error of z-scored targets, masked mean over labels.

    Args:
        logits: (batch, members, targets, 1), z-scores.
        values: (batch, targets), in the targets' units; anything, NaN too, where masked out.
        mask: (batch, targets) bool, True where there is a label.
        mean: (targets,), of the training labels.
        std: (targets,), of the training labels.

    Returns:
        A scalar, without unit.
    """
    return masked_mean((logits[..., 0] - _z_scores(values, mask, mean, std)) ** 2, mask)


def focal_r(
    logits: Tensor,
    values: Tensor,
    mask: Tensor,
    mean: Tensor,
    std: Tensor,
    gamma: float = 1.0,
    beta: float = FOCAL_BETA,
) -> Tensor:
    """Squared error times σ(β|e|)^γ, masked mean over labels; shapes as in ``mse``.

    Args:
        gamma: how much less small errors count; 0 is ``mse``.
        beta: how soon an error counts as large.

    A small error keeps a weight of ½^γ, as METHODS has it. The code published with Focal-R scales
    the sigmoid to 2σ − 1 instead, whose weight vanishes with the error.

    Raises:
        UsageError: ``gamma`` or ``beta`` is negative.
    """
    if gamma < 0 or beta < 0:
        raise UsageError(f"focal-R has γ {gamma} and β {beta}; 0 and above are accepted")
    error = logits[..., 0] - _z_scores(values, mask, mean, std)
    weight = (beta * error.abs()).sigmoid() ** gamma
    return masked_mean(weight * error**2, mask)


def gaussian_nll(logits: Tensor, values: Tensor, mask: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """½[log σ² + (y − μ)²/σ²] of z-scored targets, masked mean over labels and members.

    Args:
        logits: (batch, members, targets, 2), mean and log σ² of z-scores.
        values: (batch, targets), as in ``mse``, like the rest.

    Returns:
        A scalar, without unit; the constant ½ log 2π is left out.
    """
    guess, variance = split_members(logits)
    error = guess - _z_scores(values, mask, mean, std)
    return masked_mean(0.5 * (variance.log() + error**2 / variance), mask)


def _z_scores(values: Tensor, mask: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Labels as z-scores, (batch, 1, targets); 0 stands for a missing one before scaling."""
    return ((values.masked_fill(~mask, 0.0) - mean) / std).unsqueeze(1)
