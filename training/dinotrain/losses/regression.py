"""Losses on scalar outputs. Source: METHODS B5."""

from torch import Tensor

from dinotrain.losses.bits import masked_mean


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
    wanted = (values.masked_fill(~mask, 0.0) - mean) / std
    return masked_mean((logits[..., 0] - wanted.unsqueeze(1)) ** 2, mask)
