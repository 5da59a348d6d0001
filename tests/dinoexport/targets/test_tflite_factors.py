"""Smoothed LayerNorms are handed to litert-torch in a form that it leaves alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoexport.graph.capture import capture_deploy
from dinoexport.passes.sequence import build_deploy_model
from dinoexport.quantize.collect import calibrate
from dinoexport.quantize.pictures import read_calibration_set
from dinoexport.quantize.prepare import prepare_
from dinoexport.recipes import parse_recipe
from dinoexport.targets.tflite.lower import lower, part_factors_
from dinoexport.targets.tflite.quantize import store_layers_
from dinotrain.checkpoint import load_checkpoint
from dinotrain.tasks import get_task


class Norms(nn.Module):
    """A smoothed norm, a plain one, and one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.exp2(torch.arange(6.0) % 3))
        self.bias = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, (6,), self.factor, None, 1e-6) + x
        return F.layer_norm(F.layer_norm(x, (6,)), (6,), self.factor, self.bias)


def test_factors_stand_behind_norms_without_a_bias() -> None:
    model, x = Norms().eval(), torch.randn(1, 4, 6)
    core = torch.export.export(model, (x,)).run_decompositions({}).module()
    wanted = core(x)
    part_factors_(core)
    torch.testing.assert_close(core(x), wanted, rtol=0, atol=0)
    norms = [n for n in core.graph.nodes if n.target == torch.ops.aten.layer_norm.default]
    weights = [n.args[2] if len(n.args) > 2 else None for n in norms]
    assert [w is None for w in weights] == [True, True, False]
    products = [n for n in core.graph.nodes if n.target == torch.ops.aten.mul.Tensor]
    assert len(products) == 1 and products[0].args[0] is norms[0]


@pytest.mark.e2e
def test_a_smoothed_model_ships_its_own_codes(tiny_checkpoint) -> None:
    """Without the change above, ``store_layers_`` refuses: the converter changed the weights."""
    deploy = build_deploy_model(load_checkpoint(tiny_checkpoint)[0])
    pictures = read_calibration_set(get_task("eyelid"), (56, 56), count=8)
    recipe = parse_recipe("w8a8:smooth")
    layers = prepare_(deploy, recipe, calibrate(deploy, pictures))
    program = capture_deploy(deploy, recipe, layers)
    store_layers_(lower(program), program)
