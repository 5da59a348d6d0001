"""Pass: attention in plain products, as delegates take it."""

from dataclasses import dataclass
from typing import final

from dinoexport.graph.deploy_blocks import PlainAttention, SplitAttention
from dinoexport.graph.deploy_model import DeployModel
from dinoexport.passes.base import Pass
from dinoexport.passes.facts import ATTENTION_PLAIN, QKV_SPLIT, TOKEN_ROWS


@final
@dataclass(frozen=True)
class WriteOutAttention(Pass):
    """Replace the attention operation by its products: lowered, it carries NaN guards, which split
    a graph between delegate and CPU. No 5 dimensions, no gather.

    Before:  sdpa(q, k, v)
    After:   softmax((d^-½·q) @ kᵀ) @ v
    """

    name = "write_out_attention"
    requires = frozenset({TOKEN_ROWS, QKV_SPLIT})
    ensures = frozenset({ATTENTION_PLAIN})

    def apply(self, model: DeployModel) -> None:
        """See Pass.apply."""
        for block in model.blocks:
            if isinstance(block.attn, SplitAttention):
                block.attn = PlainAttention(block.attn)
