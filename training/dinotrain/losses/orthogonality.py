"""Regularisers that keep what tasks read apart, and a gauge of how far they do. Source: METHODS B5.

``task_orthogonality`` is OR ``task``, ``soft_orthogonality`` is OR ``so``, and
``gradient_overlap`` is OR ``grad``, which is reported and not trained on.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dinotrain.errors import ShapeError


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


def soft_orthogonality(hidden_weights: Sequence[Tensor]) -> Tensor:
    """‖WᵀW − I‖²_F / d² with the Gram matrix on the smaller side (d × d), mean over layers.

    Args:
        hidden_weights: one (out, in) or (out, in, kernel…) per hidden layer; a convolution counts
            as (out, in·kernel).

    Returns:
        A scalar; 0 where every layer has orthonormal rows or columns, or there is none.

    Raises:
        ShapeError: a weight has fewer than two dimensions.
    """
    penalties = []
    for weight in hidden_weights:
        if weight.dim() < 2:
            raise ShapeError(
                f"soft orthogonality is of matrices, and a weight is {tuple(weight.shape)}; "
                "give the weights of linear and convolution layers, without their biases"
            )
        matrix = weight.flatten(1)
        gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        penalties.append((gram - identity).square().mean())
    return torch.stack(penalties).mean() if penalties else torch.zeros(())


def gradient_overlap(task_losses: Sequence[Tensor], embedding: Tensor | Sequence[Tensor]) -> Tensor:
    """Mean squared cosine between the tasks' gradients at the embedding that they share.

    Args:
        task_losses: one scalar per task, computed from ``embedding``.
        embedding: one or more tensors of any shape that require a gradient; their gradients
            together are one vector.

    Returns:
        A scalar in [0, 1], detached: a diagnostic. A task without a gradient (no labels in the
        batch, or another branch) overlaps with none; 0 for fewer than two tasks. The graph is kept
        for the backward pass of training.
    """
    parts = [embedding] if isinstance(embedding, Tensor) else list(embedding)
    directions = []
    for loss in task_losses:
        found: Sequence[Tensor | None] = [None] * len(parts)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, parts, retain_graph=True, allow_unused=True)
        gradient = torch.cat(
            [
                (torch.zeros_like(part) if g is None else g.detach()).flatten().float()
                for part, g in zip(parts, found, strict=True)
            ]
        )
        directions.append(F.normalize(gradient, dim=0))
    if len(directions) < 2:
        return parts[0].new_zeros(())
    cosines = torch.stack(directions) @ torch.stack(directions).T
    pairs = torch.triu_indices(len(directions), len(directions), offset=1)
    return cosines[pairs[0], pairs[1]].square().mean()
