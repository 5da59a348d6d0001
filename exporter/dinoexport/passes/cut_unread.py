"""Pass: drop what stands behind the last layer that is read."""

from dataclasses import dataclass
from typing import final

from dinoexport.graph.deploy_backbones import DeployViT
from dinoexport.graph.deploy_model import DeployModel
from dinoexport.passes.base import Pass
from dinoexport.passes.facts import UNREAD_CUT


@final
@dataclass(frozen=True)
class CutUnread(Pass):
    """Drop blocks, or stages, after the last one that the pool reads.

    Before, with a pool over blocks 1 and 3:  blocks 0, 1, 2, 3, 4, 5
    After:                                    blocks 0, 1, 2, 3
    """

    name = "cut_unread"
    ensures = frozenset({UNREAD_CUT})

    def apply(self, model: DeployModel) -> None:
        """See Pass.apply."""
        backbone, deepest = model.backbone, model.pool.deepest
        if not isinstance(backbone, DeployViT):
            backbone.deepest = deepest
        elif deepest is not None:
            backbone.blocks = backbone.blocks[: deepest + 1]
