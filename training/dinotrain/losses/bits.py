"""Losses on the bits of encoded targets: cross-entropy and focal. Source: METHODS B5."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dinotrain.errors import UsageError


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the entries that have a label; 0 (with a gradient of 0) where none has.

    Args:
        values: (batch, members, targets), finite everywhere.
        mask: (batch, targets) bool, True where there is a label.

    Every label counts the same: a target with few labels in a batch is not raised above the others.
    """
    weights = mask.unsqueeze(1).to(values.dtype).expand_as(values)
    return (values * weights).sum() / weights.sum().clamp(min=1)


def bit_weights(bits: int, rho: float) -> Tensor:
    """Return w_k ∝ ρ^k with mean 1, most significant first: (bits,). ρ < 1 spares fine bits."""
    if not 0 < rho <= 1:
        raise UsageError(f"bit weight ratio is {rho}; above 0 up to 1 is accepted")
    weights = rho ** torch.arange(bits, dtype=torch.float64)
    return (weights * bits / weights.sum()).float()


def focal(
    logits: Tensor, bits: Tensor, mask: Tensor, gamma: float, weights: Tensor | None = None
) -> Tensor:
    """Focal loss: −Σ_k w_k[b(1−p)^γ log p + (1−b)p^γ log(1−p)], masked mean over labels.

    Args:
        logits: (batch, members, targets, bits).
        bits: (batch, targets, bits), 0 or 1.
        mask: (batch, targets) bool, True where there is a label.
        gamma: 0 is cross-entropy.
        weights: (bits,), all 1 where None.

    Returns:
        A scalar.
    """
    wanted = bits.unsqueeze(1).expand_as(logits)
    loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    if gamma:
        # Probability of the wrong bit, from the logit itself: 1 − p would lose digits near 1.
        wrong = torch.sigmoid(torch.where(wanted > 0.5, -logits, logits))
        loss = loss * wrong**gamma
    if weights is not None:
        loss = loss * weights
    return masked_mean(loss.sum(dim=-1), mask)


def bce(logits: Tensor, bits: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """Binary cross-entropy summed over bits, masked mean over labels; shapes as in ``focal``."""
    return focal(logits, bits, mask, 0.0, weights)
