"""Gaussian members: heads that give a mean and a variance per target, and their mixture.

A ``BranchHead`` of width ``WIDTH`` is such a head; it is trained with ``gaussian_nll``. Source:
METHODS B6.
"""

import torch
from torch import Tensor, nn

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


class GaussianDecoder(nn.Module):
    """Gaussian members to values with a standard deviation; a part of the deploy graph.

    Args:
        targets: how many.

    The buffers ``mean`` and ``std``, (targets,), are those of the training labels and are set when
    training starts, as in ``encoding.Decoder``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, targets: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(targets))
        self.register_buffer("std", torch.ones(targets))

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(B, members, targets, 2) → (B, targets) values and standard deviations, in their units.

        The standard deviation holds the noise that members see in the labels and what they
        disagree on.
        """
        mean, variance = mix(*split_members(logits))
        return self.mean + self.std * mean, self.std * variance.sqrt()
