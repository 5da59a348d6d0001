"""Pass: in the last block compute only the tokens that are read."""

from dataclasses import dataclass
from typing import final

from dinoexport.graph.deploy_model import DeployModel
from dinoexport.passes.base import Pass
from dinoexport.passes.facts import LAST_BLOCK_CUT, QKV_SPLIT, TOKEN_ROWS, UNREAD_CUT


@final
@dataclass(frozen=True)
class CutLastBlock(Pass):
    """Where a pool reads CLS alone, queries and all behind them are of CLS alone in the last block;
    keys and values stay those of all tokens. Where it reads more, nothing is cut.

    Before, last block:  x + attn(norm1 x), (B, T, D); x + mlp(norm2 x), (B, T, D)
    After:               x[:, :1] + attn(norm1 x[:, :1], norm1 x), (B, 1, D); mlp of (B, 1, D)
    """

    name = "cut_last_block"
    requires = frozenset({TOKEN_ROWS, UNREAD_CUT, QKV_SPLIT})
    ensures = frozenset({LAST_BLOCK_CUT})

    def apply(self, model: DeployModel) -> None:
        """See Pass.apply."""
        if model.pool.reads_cls_only and model.blocks:
            model.blocks[-1].rows = 1
