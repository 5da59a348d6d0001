"""Pass: one linear layer for queries, keys and values becomes three."""

from dataclasses import dataclass
from typing import final

from dinoexport.graph.deploy_blocks import SplitAttention
from dinoexport.graph.deploy_model import DeployModel
from dinoexport.passes.base import Pass
from dinoexport.passes.facts import QKV_SPLIT, TOKEN_ROWS
from dinotrain.backbones.vit import Attention


@final
@dataclass(frozen=True)
class SplitQkv(Pass):
    """Give queries, keys and values a layer each, so that nothing is sliced out of a wide result.

    Before:  q, k, v = chunk(linear(x; W, b), 3)
    After:   q = linear(x; Wq, bq); k = linear(x; Wk, bk); v = linear(x; Wv, bv)
    """

    name = "split_qkv"
    requires = frozenset({TOKEN_ROWS})
    ensures = frozenset({QKV_SPLIT})

    def apply(self, model: DeployModel) -> None:
        """See Pass.apply."""
        for block in model.blocks:
            if isinstance(block.attn, Attention):
                block.attn = SplitAttention(block.attn)
