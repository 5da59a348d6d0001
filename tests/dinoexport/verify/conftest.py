"""The reference of the tiny checkpoint, made once; do not change it."""

from pathlib import Path

import pytest
import torch

from dinoexport.verify.reference import Reference, make_reference
from dinotrain.checkpoint import load_checkpoint
from dinotrain.digests import digest


@pytest.fixture(scope="session")
def reference(tiny_checkpoint: Path) -> Reference:
    model, _ = load_checkpoint(tiny_checkpoint)
    return make_reference(model, digest(tiny_checkpoint), torch.device("cpu"))
