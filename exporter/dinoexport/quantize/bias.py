"""Bias correction: what rounding adds to each output channel on average comes off its bias.

Source: Nagel et al., "Data-free quantization through weight equalization and bias correction"
(2019), with the mean taken over calibration pictures.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoexport.quantize.calibration import CalibrationSet
from dinoexport.quantize.collect import run_samples, watched
from dinoexport.quantize.layers import Layer, quantises_activations, weighted_layers
from dinoexport.quantize.simulate import input_rounding


@torch.no_grad()
def mean_errors(
    model: nn.Module, layers: Mapping[str, Layer], pictures: CalibrationSet
) -> dict[str, Tensor]:
    """Return what rounding adds to the outputs of quantised layers, on average over all tokens.

    Each layer is judged on what the unrounded model gives it, so errors before it do not count.

    Args:
        model: whose weights are not yet rounded.
        layers: how its layers will ship, with stored weights and ranges.
        pictures: to run it on.

    Returns:
        {layer: (outputs,) float32}, of the linear layers within blocks that have a bias.
    """
    modules = {
        name: module
        for name, module in weighted_layers(model).items()
        if layers[name].stored is not None
        and quantises_activations(name, module)
        and module.bias is not None
    }
    weights = {
        name: torch.from_numpy(layers[name].stored.values()).to(module.weight.device)  # type: ignore[union-attr]
        for name, module in modules.items()
    }
    roundings = {name: input_rounding(layers[name]) for name in modules}
    sums = {name: torch.zeros(len(m.weight), dtype=torch.float64) for name, m in modules.items()}
    counts = dict.fromkeys(modules, 0)

    def note(name: str, read: Tensor, given: Tensor) -> None:
        rounding = roundings[name]
        rounded = F.linear(rounding(read) if rounding else read, weights[name], modules[name].bias)
        error = (rounded - given).reshape(-1, given.shape[-1])
        sums[name] += error.sum(dim=0, dtype=torch.float64).cpu()
        counts[name] += len(error)

    with watched(modules, note):
        run_samples(model, pictures)
    return {name: (sums[name] / counts[name]).float() for name in modules}
