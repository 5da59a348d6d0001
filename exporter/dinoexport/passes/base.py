"""What a pass is, and the runner that applies a list of them in order.

Passes rewrite the deploy module before it is captured, not the captured graph, because modules name
what a graph forgets: which linear layer reads a LayerNorm, which factor is a LayerScale, where a
block ends. And the reference runs the same module in eager mode, so each rewrite is checked against
the trained model before any converter sees it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dinoexport.errors import PassError
from dinoexport.graph.deploy_model import DeployModel


@dataclass(frozen=True)
class Pass(ABC):
    """One rewrite that preserves the function of a deploy model. Subclasses are final.

    What does not concern a family of backbones leaves it as it is; its facts are true of it then.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    """Facts that must hold before."""
    ensures: ClassVar[frozenset[str]] = frozenset()
    """Facts that hold after."""
    breaks: ClassVar[frozenset[str]] = frozenset()
    """Facts that no longer hold after."""

    @abstractmethod
    def apply(self, model: DeployModel) -> None:
        """Rewrite a deploy model, in place."""


def apply_passes(model: DeployModel, passes: Sequence[Pass]) -> DeployModel:
    """Apply passes in order, in place, and return the model.

    Raises:
        PassError: a pass lacks what it requires, or failed; it is named, and those before it.
    """
    for step in passes:
        before = ", ".join(model.passes) or "none"
        missing = sorted(step.requires - model.facts)
        if missing:
            raise PassError(
                f"pass {step.name} requires that {missing[0]}, which does not hold; passes run "
                f"before it: {before}. Put it behind a pass that ensures this."
            )
        try:
            step.apply(model)
        except Exception as error:  # whatever a rewrite raises, the pass is what must be named
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
            raise PassError(
                f"pass {step.name} failed: {reason.rstrip('.')}; passes run before it: {before}. "
                "Please report the checkpoint's configuration."
            ) from error
        model.facts = (model.facts | step.ensures) - step.breaks
        model.passes = (*model.passes, step.name)
    model.eval().requires_grad_(False)
    return model
