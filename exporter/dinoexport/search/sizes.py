"""How large an artifact will be, before it is built: by what each precision takes for a layer."""

from collections.abc import Iterable, Mapping

from torch import nn

from dinoexport.quantize.layers import Weighted, weighted_layers
from dinoexport.quantize.prepare import assign_layers
from dinoexport.recipes import PALETTE_GROUP, Precision, Recipe, WeightKind
from dinoexport.search.groups import group_layers

_HALF = 2
"""Bytes of a scale, of a number in a table, and of a weight at fp16."""


def weight_bytes(model: nn.Module, recipe: Recipe) -> int:
    """Return what the weights of a recipe's layers take; all else is the same in all recipes.

    Formats differ a little in it: what a table may hold, what is left in half precision.

    Args:
        model: a deploy model.
        recipe: see ``assign_layers``.
    """
    assigned: Mapping[str, Precision] = assign_layers(model, recipe)
    return sum(
        layer_bytes(module, assigned[name]) for name, module in weighted_layers(model).items()
    )


def group_sizes(model: nn.Module, groups: Iterable[str]) -> dict[str, int]:
    """Return how many weights the layers of some groups have."""
    modules = weighted_layers(model)
    members = group_layers(modules)
    return {g: sum(modules[name].weight.numel() for name in members[g]) for g in groups}


def layer_bytes(module: Weighted, precision: Precision) -> int:
    """Return what the weight of one layer takes."""
    count, outputs = module.weight.numel(), len(module.weight)
    half = count * _HALF
    if precision.is_float:
        return half * precision.bits // 16
    codes = count * precision.bits // 8
    if precision.kind is WeightKind.PALETTE:
        groups = -(-outputs // PALETTE_GROUP)
        return min(half, codes + groups * 2**precision.bits * _HALF)
    if not precision.block:
        return codes + outputs * _HALF
    # As ``store_weight``: where blocks do not fit there are 8 bits.
    weight = module.weight
    blocked = not weight.shape[1] % precision.block and weight[0, 0].numel() == 1
    return codes + count // precision.block * _HALF if blocked else count + outputs * _HALF
