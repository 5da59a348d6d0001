"""Pass: BatchNorm into the convolution before it."""

from dataclasses import dataclass
from typing import final

from dinoexport.graph.deploy_backbones import DeployConvNet
from dinoexport.graph.deploy_model import DeployModel
from dinoexport.passes.base import Pass
from dinoexport.passes.facts import BATCH_NORMS_FOLDED
from dinotrain.backbones.convnets.folding import fold_batch_norms


@final
@dataclass(frozen=True)
class FoldBatchNorms(Pass):
    """With stored statistics a BatchNorm is one factor a and one offset b per channel.

    Before:  y = a·conv(x; W) + b
    After:   y = conv(x; a·W, b)
    """

    name = "fold_batch_norms"
    ensures = frozenset({BATCH_NORMS_FOLDED})

    def apply(self, model: DeployModel) -> None:
        """See Pass.apply."""
        if isinstance(model.backbone, DeployConvNet):
            model.backbone.net = fold_batch_norms(model.backbone.net)
