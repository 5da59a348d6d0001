"""Integer activations in PyTorch: the inputs of layers are rounded as a recipe says.

Exact arithmetic on rounded numbers: what remains to an artifact is the order of its sums.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dinoexport.errors import BuildError
from dinoexport.quantize.layers import Layer, Range, weighted_layers
from dinoexport.recipes import Activations

Rounding = Callable[[Tensor], Tensor]
_TOP16 = 32767


@contextmanager
def simulated(
    model: nn.Module, layers: Mapping[str, Layer], *, outputs: bool = False
) -> Iterator[None]:
    """Round the inputs of a prepared model's layers, while it holds.

    Args:
        model: that ``prepare_`` changed.
        layers: that it gave.
        outputs: round what layers give as well, as formats do whose integer layers give integers.

    Raises:
        BuildError: a layer of calibrated activations has no range.
    """
    modules = weighted_layers(model)
    hooks = []
    for name, layer in layers.items():
        rounding = input_rounding(layer)
        if rounding is not None:
            hooks.append(modules[name].register_forward_pre_hook(_before(rounding)))
        if outputs and rounding is not None and layer.output_range is not None:
            after = _static(layer, layer.output_range)
            hooks.append(modules[name].register_forward_hook(_behind(after)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def input_rounding(layer: Layer) -> Rounding | None:
    """Return what is done to a layer's input before it is multiplied; None where it stays float.

    Raises:
        BuildError: the layer has no range where its precision wants one.
    """
    kind = layer.precision.activations
    if kind is Activations.FLOAT:
        return None
    if kind is Activations.INT8_DYNAMIC:
        return round_dynamic
    return _static(layer, layer.input_range)


def round_int8(x: Tensor, limits: Range) -> Tensor:
    """Round to 256 steps of a range that holds zero; zero stays zero, what is outside is clipped.

    Args:
        x: any shape.
        limits: lower and upper end.
    """
    low, high = limits
    scale = (high - low) / 255
    zero = min(max(round(-128 - low / scale), -128), 127)
    codes = torch.clamp(torch.round(x / scale) + zero, -128, 127)
    return (codes - zero) * scale


def round_int16(x: Tensor, limits: Range) -> Tensor:
    """Round to 65,535 steps, as many below zero as above."""
    scale = max(-limits[0], limits[1]) / _TOP16
    return torch.clamp(torch.round(x / scale), -_TOP16, _TOP16) * scale


def round_dynamic(x: Tensor) -> Tensor:
    """Round to 256 steps of the range that each picture has.

    Args:
        x: (B, …), one picture to each entry.
    """
    axes = tuple(range(1, x.ndim))
    low = x.amin(dim=axes, keepdim=True).clamp(max=0)
    high = x.amax(dim=axes, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(x.dtype).tiny)
    zero = torch.round(-128 - low / scale)
    codes = torch.clamp(torch.round(x / scale) + zero, -128, 127)
    return (codes - zero) * scale


def _static(layer: Layer, limits: Range | None) -> Rounding:
    if limits is None:
        raise BuildError(
            f"{layer.name} is {layer.precision.name} and has no range. Prepare the model with a "
            "calibration."
        )
    wide = layer.precision.activations is Activations.INT16
    return lambda x: (round_int16 if wide else round_int8)(x, limits)


def _before(rounding: Rounding):
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (rounding(inputs[0]), *inputs[1:])

    return hook


def _behind(rounding: Rounding):
    def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return rounding(output)

    return hook
