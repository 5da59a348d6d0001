"""Pass: the position embedding at one image size becomes a constant."""

from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from dinoexport.graph.deploy_backbones import DeployViT
from dinoexport.graph.deploy_model import DeployModel
from dinoexport.passes.base import Pass
from dinoexport.passes.facts import POSITION_BAKED


@final
@dataclass(frozen=True)
class BakePosition(Pass):
    """Resample the position embedding, and add CLS to its own, once for all.

    Before:  prefix = cat(cls + pos[0], registers); position = bicubic(pos[1:], grid)
    After:   prefix, position are parameters
    """

    name = "bake_position"
    ensures = frozenset({POSITION_BAKED})

    def apply(self, model: DeployModel) -> None:
        """See Pass.apply."""
        vit = model.backbone
        if not isinstance(vit, DeployViT):
            return
        with torch.no_grad():
            prefix, position = vit.constants()
        vit.prefix = nn.Parameter(prefix.detach().clone(), requires_grad=False)
        vit.position = nn.Parameter(position.detach().clone(), requires_grad=False)
        vit.embedding = None
