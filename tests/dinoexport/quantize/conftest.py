"""A tiny deploy model, the pictures that it is calibrated on, and what was found; do not change
them: models are given as copies.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dinoexport.graph.deploy_model import DeployModel
from dinoexport.passes.sequence import build_deploy_model
from dinoexport.quantize.calibration import Calibration, CalibrationSet
from dinoexport.quantize.collect import calibrate
from dinoexport.quantize.pictures import read_calibration_set
from dinotrain.checkpoint import load_checkpoint
from dinotrain.tasks import get_task

SIZE = (56, 56)
COUNT = 8


@pytest.fixture(scope="session")
def pictures() -> CalibrationSet:
    return read_calibration_set(get_task("eyelid"), SIZE, count=COUNT)


@pytest.fixture(scope="session")
def _deployed(tiny_checkpoint: Path) -> DeployModel:
    return build_deploy_model(load_checkpoint(tiny_checkpoint)[0])


@pytest.fixture
def deploy(_deployed: DeployModel) -> DeployModel:
    """The tiny checkpoint's deploy model, to be changed at will."""
    return copy.deepcopy(_deployed)


@pytest.fixture(scope="session")
def calibration(_deployed: DeployModel, pictures: CalibrationSet) -> Calibration:
    return calibrate(_deployed, pictures)


@pytest.fixture(scope="session")
def outputs() -> Callable[[DeployModel, CalibrationSet], torch.Tensor]:
    """Give all outputs of a model on some pictures as one vector."""
    from dinoexport.quantize.collect import to_pixels

    def run(model: DeployModel, pictures: CalibrationSet) -> torch.Tensor:
        with torch.no_grad():
            rows = [torch.cat(model(*to_pixels(model, s))) for s in pictures.samples]
        return torch.cat(rows)

    return run
