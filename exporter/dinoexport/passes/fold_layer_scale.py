"""Pass: LayerScale into the linear layer before it."""

from dataclasses import dataclass
from typing import cast, final

import torch
from torch import nn

from dinoexport.graph.deploy_blocks import DeployBlock
from dinoexport.graph.deploy_model import DeployModel
from dinoexport.passes.base import Pass
from dinoexport.passes.facts import LAYER_SCALE_FOLDED, TOKEN_ROWS
from dinoexport.passes.fold_layer_norms import mlp_ends


@final
@dataclass(frozen=True)
class FoldLayerScale(Pass):
    """Fold the factor γ of each channel that a block multiplies its two halves by.

    For the reason given in ``fold_layer_norms``: a converter does it too, and too late.

    Before:  x + γ·linear(y; W, b)
    After:   x + linear(y; γ·W, γ·b)
    """

    name = "fold_layer_scale"
    requires = frozenset({TOKEN_ROWS})
    ensures = frozenset({LAYER_SCALE_FOLDED})

    def apply(self, model: DeployModel) -> None:
        """See Pass.apply."""
        for block in model.blocks:
            fold_layer_scale_(block)


@torch.no_grad()
def fold_layer_scale_(block: DeployBlock) -> None:
    """Fold both factors of a block, in place."""
    proj = cast("nn.Linear", block.attn.proj)
    for name, linear in (("ls1", proj), ("ls2", mlp_ends(block)[1])):
        scale = getattr(block, name).gamma
        linear.weight.mul_(scale[:, None])
        linear.bias.mul_(scale)
        setattr(block, name, nn.Identity())
