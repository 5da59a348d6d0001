"""Pass: the scale of attention into the layer that makes queries."""

from dataclasses import dataclass
from typing import final

import torch

from dinoexport.graph.deploy_blocks import PlainAttention
from dinoexport.graph.deploy_model import DeployModel
from dinoexport.passes.base import Pass
from dinoexport.passes.facts import ATTENTION_PLAIN, ATTENTION_SCALE_FOLDED, TOKEN_ROWS


@final
@dataclass(frozen=True)
class FoldAttentionScale(Pass):
    """Fold the scale s = d^-½; of 64 channels per head it is ⅛, so no digit changes.

    Before:  softmax((s·linear(x; Wq, bq)) @ kᵀ) @ v
    After:   softmax(linear(x; s·Wq, s·bq) @ kᵀ) @ v
    """

    name = "fold_attention_scale"
    requires = frozenset({TOKEN_ROWS, ATTENTION_PLAIN})
    ensures = frozenset({ATTENTION_SCALE_FOLDED})

    def apply(self, model: DeployModel) -> None:
        """See Pass.apply."""
        for block in model.blocks:
            if isinstance(block.attn, PlainAttention):
                fold_attention_scale_(block.attn)


@torch.no_grad()
def fold_attention_scale_(attention: PlainAttention) -> None:
    """Scale the layer that makes queries instead of the queries, in place."""
    attention.q.weight.mul_(attention.scale)
    attention.q.bias.mul_(attention.scale)
    attention.scale = 1.0
