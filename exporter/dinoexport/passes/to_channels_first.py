"""Pass: the layout of Apple's Neural Engine."""

from dataclasses import dataclass
from typing import final

from dinoexport.graph.deploy_backbones import DeployViT
from dinoexport.graph.deploy_channels import ChannelsViT
from dinoexport.graph.deploy_model import DeployModel
from dinoexport.passes.base import Pass
from dinoexport.passes.facts import (
    ATTENTION_SCALE_FOLDED,
    LAYER_SCALE_FOLDED,
    NORMS_FOLDED,
    POSITION_BAKED,
    TOKEN_COLUMNS,
    TOKEN_ROWS,
)


@final
@dataclass(frozen=True)
class ToChannelsFirst(Pass):
    """Keep tokens as columns, (B, D, 1, T), from the patch convolution to what pools read.

    Before:  x (B, T, D); linear(x; W); softmax(q @ kᵀ) @ v of all queries
    After:   x (B, D, 1, T); conv(x; W as 1×1); the same of equal chunks of at most 512 queries
    """

    name = "to_channels_first"
    requires = frozenset(
        {TOKEN_ROWS, POSITION_BAKED, NORMS_FOLDED, LAYER_SCALE_FOLDED, ATTENTION_SCALE_FOLDED}
    )
    ensures = frozenset({TOKEN_COLUMNS})
    breaks = frozenset({TOKEN_ROWS})

    def apply(self, model: DeployModel) -> None:
        """See Pass.apply."""
        if isinstance(model.backbone, DeployViT):
            model.backbone = ChannelsViT(model.backbone)
