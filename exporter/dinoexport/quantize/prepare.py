"""A deploy model → the same model with the numbers that a recipe ships, before it is captured.

Rounding happens here and not in the targets, so that every target of a recipe ships the same
numbers, and the PyTorch model with these numbers is what the structure of an artifact is held
against.
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dinoexport.errors import BuildError
from dinoexport.quantize.bias import mean_errors
from dinoexport.quantize.calibration import Calibration
from dinoexport.quantize.collect import calibrate
from dinoexport.quantize.layers import Layer, Weighted, for_layer, weighted_layers
from dinoexport.quantize.outliers import NORMAL, PART, SplitLinear, narrowed, split_outliers_
from dinoexport.quantize.smoothing import smooth_
from dinoexport.quantize.weights import StoredWeight, store_weight
from dinoexport.recipes import PRECISIONS, Activations, Precision, Recipe

Known = dict[tuple[str, str], StoredWeight]
"""{(layer, precision): its weights, quantised}."""


def prepare_(
    model: nn.Module,
    recipe: Recipe,
    calibration: Calibration | None = None,
    known: Known | None = None,
) -> dict[str, Layer]:
    """Quantise and round a deploy model in place; what is not quantised keeps 11 bits, or all of
    them where the recipe's base is fp32.

    Args:
        model: a deploy model; eval mode, float32.
        recipe: what for.
        calibration: of this model as it is; needed where ``recipe.calibrated``. Modifiers run the
            model on its pictures again, with its observer.
        known: weights of this model as it is that were quantised before, which are not quantised
            again; others are added. Not looked at where modifiers change weights.

    Returns:
        {layer name: how it ships}, in running order.

    Raises:
        UsageError: the recipe names a layer that is not there.
        BuildError: the recipe wants calibration and there is none; nothing of the model can be
            quantised so; a weight does not fit into half precision.
    """
    precisions = assign_layers(model, recipe)
    if recipe.calibrated and calibration is None:
        raise BuildError(
            f"--precision {recipe.name} needs calibration: give pictures with --calibration."
        )
    if calibration is not None:
        calibration = _modify_(model, recipe, calibration, precisions)
    modules = weighted_layers(model)
    precisions = {name: _precision_of(name, precisions) for name in modules}
    known = {} if known is None or recipe.modifiers else known
    layers = {
        name: _with_ranges(
            _store(name, module, precisions[name], known), module, model, calibration
        )
        for name, module in modules.items()
    }
    if calibration is not None and "bias" in recipe.modifiers:
        for name, error in mean_errors(model, layers, calibration.pictures).items():
            modules[name].bias.sub_(error.to(modules[name].bias.device))  # type: ignore[union-attr]
    for name, layer in layers.items():
        _round_weight_(modules[name], layer)
    if recipe.base.name != "fp32":
        kept = {id(modules[n].weight) for n, p in precisions.items() if p.name != "fp16"}
        _round_rest_(model, kept)
    return layers


def assign_layers(model: nn.Module, recipe: Recipe) -> dict[str, Precision]:
    """Return what a recipe comes to for each layer of a model, in running order.

    Raises:
        UsageError: the recipe names a layer that is not there.
        BuildError: it quantises activations, and the model has no layer for it.
    """
    modules = weighted_layers(model)
    assigned = recipe.assign(modules)
    precisions = {name: for_layer(assigned[name], name, m) for name, m in modules.items()}
    _check_applies(recipe, precisions)
    return precisions


def _check_applies(recipe: Recipe, precisions: dict[str, Precision]) -> None:
    """Refuse a recipe of quantised activations for a model that has no layers for it."""
    for wanted in recipe.precisions:
        if wanted.weights_only() is not wanted and wanted not in precisions.values():
            raise BuildError(
                f"--precision {wanted.name}: this model has no layer whose activations can be "
                "quantised; those are linear layers within transformer blocks. "
                f"Use {wanted.weights_only().name}."
            )


def _modify_(
    model: nn.Module, recipe: Recipe, calibration: Calibration, precisions: Mapping[str, Precision]
) -> Calibration:
    """Apply what changes activations, and return a calibration of what is then there."""
    if "smooth" in recipe.modifiers and smooth_(model, calibration, precisions):
        calibration = calibrate(model, calibration.pictures, calibration.observer)
    if "outliers" in recipe.modifiers and split_outliers_(model, calibration, precisions):
        calibration = calibrate(model, calibration.pictures, calibration.observer)
    return calibration


def _precision_of(name: str, precisions: Mapping[str, Precision]) -> Precision:
    """Return the precision of a layer, which a modifier may have made of another one."""
    if PART in name:
        return PRECISIONS["fp16"]
    return precisions[name.removesuffix(NORMAL)]


def _store(name: str, module: Weighted, precision: Precision, known: Known) -> Layer:
    """Quantise a layer's weights; the module keeps its own."""
    if precision.is_float:
        return Layer(name, precision)
    if not bool(module.weight.isfinite().all()):
        raise BuildError(f"{name} holds weights that are not finite. Train the model again.")
    key = name, precision.name
    if key not in known:
        known[key] = store_weight(module.weight.detach().cpu().numpy(), precision)
    return Layer(name, precision, known[key])


def _with_ranges(
    layer: Layer, module: Weighted, model: nn.Module, calibration: Calibration | None
) -> Layer:
    """Add the ranges that a calibrated precision clips to."""
    if calibration is None or not layer.precision.calibrated:
        return layer
    seen = calibration.layers[layer.name]
    reads, gives = seen.input.range, seen.output.range
    if layer.precision.activations is Activations.INT16:
        # Clipping is chosen for 8 bits; at 16 there are steps enough for everything.
        reads, gives = (-seen.input.peak, seen.input.peak), (-seen.output.peak, seen.output.peak)
    whole = next(
        (m for m in model.modules() if isinstance(m, SplitLinear) and m.normal is module), None
    )
    if whole is not None:
        reads = narrowed(reads, seen.input, whole.channels)
    return dataclasses.replace(layer, input_range=reads, output_range=gives)


@torch.no_grad()
def _round_weight_(module: Weighted, layer: Layer) -> None:
    if layer.stored is not None:
        module.weight.copy_(torch.from_numpy(layer.stored.values()))
        return
    if layer.precision.name != "fp16":
        return
    module.weight.copy_(_half(f"{layer.name}.weight", module.weight))
    if module.bias is not None:
        module.bias.copy_(_half(f"{layer.name}.bias", module.bias))


@torch.no_grad()
def _round_rest_(model: nn.Module, kept: set[int]) -> None:
    for name, weight in model.named_parameters():
        # The decoder has no parameters: its constants stay in float32.
        if id(weight) not in kept:
            weight.copy_(_half(name, weight))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            # Core ML stores epsilon in half precision too: 1e-6 becomes 1.0133e-6.
            module.eps = float(torch.tensor(module.eps).half())


def _half(name: str, weight: Tensor) -> Tensor:
    rounded = weight.half().float()
    if not bool(rounded.isfinite().all()):
        raise BuildError(
            f"{name} holds {float(weight.abs().max()):.3g}, half precision ends at 65504. "
            "Build with --precision fp32."
        )
    return rounded
