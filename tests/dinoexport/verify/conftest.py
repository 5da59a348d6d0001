"""The reference of the tiny checkpoint, made once; do not change it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dinoexport.passes.sequence import build_deploy_model
from dinoexport.quantize.prepare import prepare_
from dinoexport.recipes import parse_recipe
from dinoexport.verify.reference import Reference, make_reference, with_deployed
from dinotrain.checkpoint import load_checkpoint
from dinotrain.digests import digest


@pytest.fixture(scope="session")
def reference(tiny_checkpoint: Path) -> Reference:
    return reference_of(tiny_checkpoint, torch.device("cpu"))


@pytest.fixture(scope="session")
def make() -> Callable[[Path, torch.device], Reference]:
    """Make a reference with values of fp16, as `dinoexport reference` does."""
    return reference_of


def reference_of(checkpoint: Path, device: torch.device) -> Reference:
    model, _ = load_checkpoint(checkpoint)
    deploy = build_deploy_model(model)
    prepare_(deploy, parse_recipe("fp16"))
    made = make_reference(model, digest(checkpoint), device)
    return with_deployed(made, "fp16", deploy, device)
