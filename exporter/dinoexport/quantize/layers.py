"""The layers of a model that recipes speak of, by name."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from dinoexport.recipes import Activations, Precision

if TYPE_CHECKING:
    from dinoexport.quantize.weights import StoredWeight

Weighted = nn.Linear | nn.Conv2d
Range = tuple[float, float]
_BACKBONE = "backbone."
_BLOCKS = "blocks."


@dataclass(frozen=True)
class Layer:
    """One layer as it ships.

    Attributes:
        name: such as ``blocks.5.mlp.fc1`` or ``head.members.0.mrd.1``.
        precision: as the recipe has it for this layer, see ``for_layer``.
        stored: its weights where they are quantised.
        input_range: what its input is clipped to where activations are quantised by calibration.
        output_range: the same of its output, for formats whose integer layers give integers.
        node: of the captured graph, whose value is the layer's output; empty before capture.
        weight: key of its weights in the captured program's state; empty before capture.
    """

    name: str
    precision: Precision
    stored: "StoredWeight | None" = None
    input_range: Range | None = None
    output_range: Range | None = None
    node: str = ""
    weight: str = ""


def weighted_layers(model: nn.Module) -> dict[str, Weighted]:
    """Return the linear layers and convolutions of a deploy model by name, in running order."""
    return {
        layer_name(path): module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def layer_name(path: str) -> str:
    """Turn the path of a module of a deploy model into the name that recipes use."""
    return path.removeprefix(_BACKBONE)


def quantises_activations(name: str, module: Weighted) -> bool:
    """Return whether a layer's input can be quantised: those of linear layers within blocks.

    The patch embedding reads pixels and the head gives the outputs: both cost little time and much
    of the error. Convolutions of the other families keep float activations too.
    """
    return isinstance(module, nn.Linear) and name.startswith(_BLOCKS)


def for_layer(precision: Precision, name: str, module: Weighted) -> Precision:
    """Return what a precision comes to for one layer: the same weights, maybe float activations."""
    if precision.activations is Activations.FLOAT or quantises_activations(name, module):
        return precision
    return precision.weights_only()
