"""A deploy model → the same model with the numbers that a recipe ships, before it is captured.

Rounding happens here and not in the targets, so that every target of a recipe ships the same
numbers, and the PyTorch model with these numbers is what the structure of an artifact is held
against.
"""

import dataclasses

import torch
from torch import Tensor, nn

from dinoexport.errors import BuildError
from dinoexport.quantize.calibration import Calibration
from dinoexport.quantize.layers import Layer, Weighted, for_layer, weighted_layers
from dinoexport.quantize.weights import store_weight
from dinoexport.recipes import Precision, Recipe


def prepare_(
    model: nn.Module, recipe: Recipe, calibration: Calibration | None = None
) -> dict[str, Layer]:
    """Quantise and round a deploy model in place; what is not quantised keeps 11 bits, or all of
    them where the recipe's base is fp32.

    Args:
        model: a deploy model; eval mode, float32.
        recipe: what for.
        calibration: of this model; needed where ``recipe.calibrated``.

    Returns:
        {layer name: how it ships}, in running order.

    Raises:
        UsageError: the recipe names a layer that is not there.
        BuildError: the recipe wants calibration and there is none; nothing of the model can be
            quantised so; a weight does not fit into half precision.
    """
    modules = weighted_layers(model)
    assigned = recipe.assign(modules)
    precisions = {name: for_layer(assigned[name], name, m) for name, m in modules.items()}
    _check_applies(recipe, precisions)
    if recipe.calibrated and calibration is None:
        raise BuildError(
            f"--precision {recipe.name} needs calibration: give pictures with --calibration."
        )
    layers = {}
    for name, precision in precisions.items():
        layers[name] = _quantise_(name, modules[name], precision)
        if calibration is not None and precision.calibrated:
            statistics = calibration.layers[name]
            layers[name] = dataclasses.replace(
                layers[name],
                input_range=statistics.input.range,
                output_range=statistics.output.range,
            )
    if recipe.base.name != "fp32":
        kept = {id(modules[n].weight) for n, p in precisions.items() if p.name != "fp16"}
        _round_rest_(model, kept)
    return layers


def _check_applies(recipe: Recipe, precisions: dict[str, Precision]) -> None:
    """Refuse a recipe of quantised activations for a model that has no layers for it."""
    for wanted in recipe.precisions:
        if wanted.weights_only() is not wanted and wanted not in precisions.values():
            raise BuildError(
                f"--precision {wanted.name}: this model has no layer whose activations can be "
                "quantised; those are linear layers within transformer blocks. "
                f"Use {wanted.weights_only().name}."
            )


@torch.no_grad()
def _quantise_(name: str, module: Weighted, precision: Precision) -> Layer:
    if precision.is_float:
        if precision.name == "fp16":
            module.weight.copy_(_half(f"{name}.weight", module.weight))
        return Layer(name, precision)
    if not bool(module.weight.isfinite().all()):
        raise BuildError(f"{name} holds weights that are not finite. Train the model again.")
    stored = store_weight(module.weight.detach().cpu().numpy(), precision)
    module.weight.copy_(torch.from_numpy(stored.values()))
    return Layer(name, precision, stored)


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
