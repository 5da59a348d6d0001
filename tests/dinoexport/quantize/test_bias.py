"""Bias correction takes the mean error off every output channel."""

import torch

from dinoexport.quantize.bias import mean_errors
from dinoexport.quantize.collect import to_pixels
from dinoexport.quantize.layers import weighted_layers
from dinoexport.quantize.prepare import prepare_
from dinoexport.quantize.simulate import round_int8
from dinoexport.recipes import parse_recipe

LAYER = "blocks.0.attn.proj"


def test_the_mean_error_is_that_of_all_tokens(_deployed, deploy, calibration, pictures) -> None:
    layers = prepare_(deploy, parse_recipe("w8a8"), calibration)
    found = mean_errors(_deployed, layers, pictures)
    assert all(name.startswith("blocks.") for name in found) and len(found) == 12
    read = []
    module = weighted_layers(_deployed)[LAYER]
    hook = module.register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0]))
    with torch.no_grad():
        for sample in pictures.samples:
            _deployed(*to_pixels(_deployed, sample))
    hook.remove()
    x = torch.cat(read).flatten(0, 1).double()
    stored = torch.from_numpy(layers[LAYER].stored.values()).double()
    rounded = round_int8(x.float(), layers[LAYER].input_range).double()
    wanted = (rounded @ stored.T - x @ module.weight.double().T).mean(dim=0)
    torch.testing.assert_close(found[LAYER].double(), wanted, rtol=1e-3, atol=1e-6)


def test_corrected_biases_have_no_mean_error_left(deploy, _deployed, calibration) -> None:
    plain = weighted_layers(_deployed)[LAYER].bias
    layers = prepare_(deploy, parse_recipe("w8a8:bias"), calibration)
    corrected = weighted_layers(deploy)[LAYER].bias
    assert layers[LAYER].stored is not None
    moved = mean_errors(_deployed, layers, calibration.pictures)[LAYER]
    # What is left is the rounding of the bias to half precision.
    torch.testing.assert_close(corrected, plain - moved, rtol=1e-3, atol=1e-6)
    assert moved.abs().max() > 1e-5
