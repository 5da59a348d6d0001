"""Cross-entropy over classes, with missing labels and class weights. Source: METHODS D."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dinotrain.errors import ShapeError

_MISSING = -100


def cross_entropy(
    logits: Tensor, classes: Tensor, mask: Tensor, class_weights: Tensor | None = None
) -> Tensor:
    """−log p of each label's class, averaged over labels by the weights of their classes.

    Args:
        logits: (batch, members, targets, classes), any float type; computed in float32.
        classes: (batch, targets) int64; anything where masked out.
        mask: (batch, targets) bool, True where there is a label.
        class_weights: (classes,), all 1 where None. Σ w_y·loss / Σ w_y, as in torch.

    Returns:
        A scalar; 0 (with a gradient of 0) where there is no label, or none of any weight.

    Raises:
        ShapeError: the weights are not one per class.
    """
    count = logits.shape[-1]
    if class_weights is None:
        class_weights = logits.new_ones(count, dtype=torch.float32)
    if class_weights.shape != (count,):
        raise ShapeError(
            f"class weights have shape {tuple(class_weights.shape)} and there are {count} classes; "
            "give one weight per class"
        )
    class_weights = class_weights.to(device=logits.device, dtype=torch.float32)
    wanted = classes.masked_fill(~mask, _MISSING).unsqueeze(1).expand(logits.shape[:-1])
    flat = wanted.reshape(-1)
    loss = F.cross_entropy(
        logits.float().reshape(-1, count),
        flat,
        weight=class_weights,
        ignore_index=_MISSING,
        reduction="sum",
    )
    total = (class_weights[flat.clamp(min=0)] * (flat != _MISSING)).sum()
    return loss / total.where(total > 0, torch.ones_like(total))


def balanced_class_weights(counts: Sequence[int]) -> Tensor:
    """Weights under which every class that occurs counts the same: samples / (classes · count).

    Args:
        counts: labelled samples per class.

    Returns:
        (classes,) float32; 0 for a class without samples, which is not among ``classes`` above.
    """
    numbers = torch.tensor(counts, dtype=torch.float64)
    present = numbers > 0
    weights = numbers.sum() / (present.sum().clamp(min=1) * numbers.clamp(min=1))
    return (weights * present).float()
