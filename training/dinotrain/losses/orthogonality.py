"""Regularisers that keep what tasks read apart. Source: METHODS B5, OR ``task``."""

import torch
import torch.nn.functional as F
from torch import Tensor


def task_orthogonality(output_weights: list[Tensor]) -> Tensor:
    """Mean squared cosine between output rows of different targets of one branch.

    R = mean_{i≠j} mean((Ŵ_i Ŵ_jᵀ)²) with rows of unit length; targets of different branches read
    different vectors and are not compared.

    Args:
        output_weights: one (targets, rows, hidden) per branch and member, as
            ``BranchHead.output_weights`` gives them.

    Returns:
        A scalar in [0, 1]; 0 where no branch has two targets.
    """
    overlaps = []
    for weights in output_weights:
        rows = F.normalize(weights, dim=-1)
        for first in range(rows.shape[0]):
            for second in range(first + 1, rows.shape[0]):
                overlaps.append((rows[first] @ rows[second].T).square().mean())
    if not overlaps:
        return output_weights[0].new_zeros(()) if output_weights else torch.zeros(())
    return torch.stack(overlaps).mean()
