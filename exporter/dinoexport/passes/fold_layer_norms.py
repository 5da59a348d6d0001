"""Pass: the affine part of a block's LayerNorms into the linear layers that read them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast, final

import torch
from torch import nn

from dinoexport.graph.deploy_blocks import DeployBlock, SplitAttention
from dinoexport.graph.deploy_model import DeployModel
from dinoexport.passes.base import Pass
from dinoexport.passes.facts import NORMS_FOLDED, QKV_SPLIT, TOKEN_ROWS


@final
@dataclass(frozen=True)
class FoldLayerNorms(Pass):
    """Fold weight γ and bias β of norm1 and norm2 of each block.

    litert-torch folds them by itself, after the weights were rounded (measured: the structural
    SQNR of an fp16 file fell from 125 to 70 dB). Folded here first, all targets round the same
    products. The final norm is read by pools, not by one linear layer, and keeps its own.

    Before:  y = linear(γ·norm(x) + β; W, b)
    After:   y = linear(norm(x); γ·W, b + W·β)
    """

    name = "fold_layer_norms"
    requires = frozenset({TOKEN_ROWS, QKV_SPLIT})
    ensures = frozenset({NORMS_FOLDED})

    def apply(self, model: DeployModel) -> None:
        """See Pass.apply."""
        for block in model.blocks:
            fold_layer_norms_(block)


def fold_layer_norms_(block: DeployBlock) -> None:
    """Fold the affine parts of a block's norms, in place; queries, keys, values are split."""
    attention = cast("SplitAttention", block.attn)
    block.norm1 = fold_affine(block.norm1, [attention.q, attention.k, attention.v])
    block.norm2 = fold_affine(block.norm2, [mlp_ends(block)[0]])


def mlp_ends(block: DeployBlock) -> tuple[nn.Linear, nn.Linear]:
    """Return the first and the last linear layer of a block's MLP, of either kind."""
    names = ("fc1", "fc2") if hasattr(block.mlp, "fc1") else ("w12", "w3")
    return getattr(block.mlp, names[0]), getattr(block.mlp, names[1])


@torch.no_grad()
def fold_affine(norm: nn.LayerNorm, linears: Sequence[nn.Linear]) -> nn.LayerNorm:
    """Fold a norm's weight and bias into all linear layers that read it.

    Args:
        norm: its affine part is what is folded.
        linears: changed in place; nothing else may read the norm.

    Returns:
        The norm that is left, without weights.
    """
    for linear in linears:
        linear.bias.add_(linear.weight @ norm.bias)
        linear.weight.mul_(norm.weight)
    return nn.LayerNorm(list(norm.normalized_shape), eps=norm.eps, elementwise_affine=False)
