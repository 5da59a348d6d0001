"""Dice and focal loss on class maps. Source: METHODS C."""

import msgspec
import torch
from torch import Tensor

from dinotrain.errors import ShapeError, UsageError

IGNORE = 255
"""Mask value of pixels that count in no loss and in no metric."""


class SegmentationLoss(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is minimised; the defaults are the brief's for background, dust, rundown and scratch.

    Without ``class_weights`` all classes weigh 1. ``dice_ignore_absent`` leaves classes that no
    label of the batch has out of the Dice mean, where each costs 1 / classes otherwise.
    """

    class_weights: tuple[float, ...] = (0.3, 3.0, 1.5, 1.5)
    dice_weight: float = 0.5
    focal_weight: float = 0.5
    alpha: float = 0.25
    gamma: float = 2.0
    epsilon: float = 1e-6
    dice_ignore_absent: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that make the loss reward errors or divide by zero."""
        lowest = min(
            *self.class_weights, self.dice_weight, self.focal_weight, self.alpha, self.gamma
        )
        if lowest < 0:
            raise UsageError(
                f"the segmentation loss has a weight, α or γ of {lowest}; 0 and above are accepted"
            )
        if self.epsilon <= 0:
            raise UsageError(
                f"the segmentation loss has ε {self.epsilon}; numbers above 0 are accepted"
            )


def segmentation_loss(logits: Tensor, masks: Tensor, config: SegmentationLoss) -> Tensor:
    """Dice and focal loss, weighted.

    Args:
        logits: (B, classes, H, W), any float type; the loss is computed in float32.
        masks: (B, H, W) int64, a class per pixel, or ``IGNORE``.
        config: weights and settings.

    Returns:
        A scalar; 0 (with a gradient of 0) where every pixel is ignored.

    Raises:
        ShapeError: masks are of another size, or classes and class weights differ in number.
    """
    if logits.dim() != 4 or masks.shape != (logits.shape[0], *logits.shape[2:]):
        raise ShapeError(
            f"logits {tuple(logits.shape)} want masks of their batch, height and width, and these "
            f"are {tuple(masks.shape)}. Resize masks with nearest neighbour."
        )
    if len(config.class_weights) not in (0, logits.shape[1]):
        raise ShapeError(
            f"{len(config.class_weights)} class weights were given for {logits.shape[1]} classes. "
            "Give one per class, or none."
        )
    weights = torch.tensor(config.class_weights, device=logits.device)
    dice = dice_loss(logits, masks, epsilon=config.epsilon, ignore_absent=config.dice_ignore_absent)
    focal = focal_loss(
        logits,
        masks,
        alpha=config.alpha,
        gamma=config.gamma,
        class_weights=weights if config.class_weights else None,
    )
    return config.dice_weight * dice + config.focal_weight * focal


def dice_loss(
    logits: Tensor, masks: Tensor, *, epsilon: float = 1e-6, ignore_absent: bool = False
) -> Tensor:
    """1 − mean over classes of (2·Σpg + ε) / (Σp + Σg + ε), sums over the batch and its pixels.

    Args:
        logits: (B, classes, H, W).
        masks: (B, H, W) int64; ``IGNORE`` pixels are in no sum.
        epsilon: keeps a class without pixels finite.
        ignore_absent: take the mean over classes that have a pixel in ``masks``.

    Returns:
        A scalar in [0, 1].
    """
    probabilities = logits.float().softmax(dim=1)
    labels = masks.unsqueeze(1)
    truth = labels == torch.arange(logits.shape[1], device=logits.device).reshape(1, -1, 1, 1)
    overlap = (probabilities * truth).sum(dim=(0, 2, 3))
    guessed = (probabilities * (labels != IGNORE)).sum(dim=(0, 2, 3))
    present = truth.sum(dim=(0, 2, 3))
    dice = (2 * overlap + epsilon) / (guessed + present + epsilon)
    if not ignore_absent:
        return 1 - dice.mean()
    there = (present > 0).to(dice.dtype)
    return ((1 - dice) * there).sum() / there.sum().clamp(min=1)


def focal_loss(
    logits: Tensor,
    masks: Tensor,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """−α·w_y(1 − p_y)^γ log p_y of each pixel's class y, plain mean over pixels that count.

    Args:
        logits: (B, classes, H, W).
        masks: (B, H, W) int64; ``IGNORE`` pixels do not count.
        alpha: factor of the whole.
        gamma: 0 is cross-entropy.
        class_weights: (classes,), all 1 where None. They are not divided out: a batch of
            background costs less than one of dust.

    Returns:
        A scalar, 0 where no pixel counts.
    """
    counted = masks != IGNORE
    classes = masks.masked_fill(~counted, 0)
    log_p = logits.float().log_softmax(dim=1).gather(1, classes.unsqueeze(1)).squeeze(1)
    loss = -alpha * log_p
    if gamma:
        # 1 − p from its logarithm, which keeps its digits where p is near 1; never quite 0, where
        # the slope of a root is infinite.
        loss = loss * (-log_p.expm1()).clamp(min=1e-12) ** gamma
    if class_weights is not None:
        loss = loss * class_weights.to(loss.dtype)[classes]
    return (loss * counted).sum() / counted.sum().clamp(min=1)
