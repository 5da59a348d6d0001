"""The module that is captured: pixels 0..255 in, named values in their units out.

A plain copy of a trained TaskModel at one image size, whose taps are recorded on the way; passes
(``dinoexport.passes``) bring it to what ships.
"""

import copy
from typing import cast

import torch
from torch import Tensor, nn

from dinoexport.graph.deploy_backbones import deploy_backbone
from dinoexport.graph.deploy_blocks import DeployBlock
from dinoexport.passes.facts import TOKEN_ROWS
from dinotrain.model import TaskModel


class DeployModel(nn.Module):
    """One image tensor per input of the task → one tensor per output, then the taps if asked.

    Args:
        model: trained, eval mode; copied, never changed.
        debug: also return every tap, in the order of ``tap_names``.

    Attributes:
        facts: what holds of it, as passes require and ensure it.
        passes: names of those that were applied, in order.
    """

    facts: frozenset[str] = frozenset({TOKEN_ROWS})
    passes: tuple[str, ...] = ()

    def __init__(self, model: TaskModel, debug: bool = False) -> None:
        super().__init__()
        self.debug = debug
        self.image_size = model.config.image_size
        self.task = model.task
        self.input_names = [i.name for i in model.task.inputs]
        self.output_names = [output.name for output in model.task.outputs(model.config)]
        self.backbone = deploy_backbone(model)
        self.pool = copy.deepcopy(model.pool)
        self.head: nn.Module = copy.deepcopy(model.head)
        self.decoder = copy.deepcopy(model.decoder)
        self.eval().requires_grad_(False)

    @property
    def blocks(self) -> list[DeployBlock]:
        """A ViT's blocks; none of a ConvNet."""
        return list(cast("list[DeployBlock]", getattr(self.backbone, "blocks", ())))

    @property
    def tap_names(self) -> list[str]:
        """Taps in the order in which they are computed."""
        return [*self.backbone.tap_names, HEAD_TAP[self.pool.gives_vector]]

    def run(self, pixels: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Outputs and taps by name; one (1, 3, H, W) tensor of 0..255 per input."""
        record = self.backbone.record
        record.clear()
        pooled = self.pool(self.pool.extract(self.backbone, torch.cat(pixels, dim=0)))  # type: ignore[arg-type]
        if self.pool.gives_vector:
            record[HEAD_TAP[True]] = pooled
        logits = self.head({n: _row(pooled, i) for i, n in enumerate(self.input_names)})
        if not self.pool.gives_vector:
            record[HEAD_TAP[False]] = logits
        taps = {name: record[name] for name in self.tap_names}
        record.clear()
        return self.decoder(logits), taps

    def forward(self, *pixels: Tensor) -> tuple[Tensor, ...]:
        """Outputs in the order of ``output_names``; with ``debug`` the taps behind them."""
        outputs, taps = self.run(pixels)
        values = tuple(outputs[name] for name in self.output_names)
        return values + tuple(taps.values()) if self.debug else values


HEAD_TAP = {True: "features", False: "logits"}
"""The last tap: the pooled vector, or what the head gives where it reads tokens or maps: these are
views of the backbone's own taps, which converters move."""


def _row(pooled: Tensor | list[Tensor], index: int) -> Tensor | list[Tensor]:
    """Return one image's part of what a pool gives."""
    if isinstance(pooled, list):
        return [x[index : index + 1] for x in pooled]
    return pooled[index : index + 1]
