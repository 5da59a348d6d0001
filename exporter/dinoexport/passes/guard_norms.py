"""Pass: LayerNorms whose squares would pass the range of half precision."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from dinoexport.graph.deploy_model import DeployModel
from dinoexport.graph.deploy_norms import SafeNorm
from dinoexport.passes.base import Pass
from dinoexport.passes.facts import HEAD_FOLDED, NORMS_FOLDED, NORMS_SAFE, TOKEN_ROWS

LARGEST_SQUARED = 255.0
"""256² is 65536, and half precision ends at 65504."""


@final
@dataclass(frozen=True)
class GuardNorms(Pass):
    """Divide by the largest magnitude m of each token before anything is squared.

    Args:
        norms: names of those that need it, such as ``backbone.blocks.3.norm2``; see
            ``large_norms``. Others are left: the guard costs five operations.

    Before:  c = x − mean(x); c·rsqrt(mean(c²) + ε)
    After:   c = x − mean(x); m = max(1, max|c|); z = c/m; z·rsqrt(mean(z²) + ε/m²)
    """

    norms: tuple[str, ...] = ()

    name = "guard_norms"
    requires = frozenset({TOKEN_ROWS, NORMS_FOLDED, HEAD_FOLDED})
    ensures = frozenset({NORMS_SAFE})

    def apply(self, model: DeployModel) -> None:
        """See Pass.apply."""
        for name in self.norms:
            parent, _, child = name.rpartition(".")
            norm = model.get_submodule(name)
            setattr(model.get_submodule(parent), child, SafeNorm(norm, axis=-1))  # type: ignore[arg-type]


@torch.no_grad()
def large_norms(model: DeployModel, samples: Iterable[tuple[Tensor, ...]]) -> tuple[str, ...]:
    """Name the LayerNorms whose centred inputs pass what half precision can square.

    Args:
        model: tokens in rows.
        samples: pixels as the model takes them, (1, 3, H, W) of 0..255 per input.

    Returns:
        Names in the order of the modules.
    """
    with watch_norms(model) as found:
        for pixels in samples:
            model.run(pixels)
    return tuple(name for name, _ in model.named_modules() if name in found)


@contextmanager
def watch_norms(model: nn.Module) -> Iterator[set[str]]:
    """Collect the names that ``large_norms`` gives, while a model is run for another reason."""
    # Subclasses normalise another axis, or are guarded.
    norms = {name: m for name, m in model.named_modules() if type(m) is nn.LayerNorm}
    found: set[str] = set()

    def watch(name: str):
        def note(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            if float((x - x.mean(dim=-1, keepdim=True)).abs().max()) > LARGEST_SQUARED:
                found.add(name)

        return note

    hooks = [norm.register_forward_pre_hook(watch(name)) for name, norm in norms.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
