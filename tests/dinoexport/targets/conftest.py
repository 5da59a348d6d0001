"""Pictures, and what the trained model itself measures on them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dinotrain.checkpoint import load_checkpoint
from dinotrain.tasks import get_task

Eyes = list[dict[str, np.ndarray]]
COUNT = 3


@pytest.fixture(scope="session")
def eyes() -> Eyes:
    """Pictures of the tiny checkpoint's size, {input: (56, 56, 3) uint8}; no parity samples."""
    rng = np.random.default_rng(21)
    # Squares of 8×8 pixels on a colour of each picture's own: noise alone measures all the same.
    squares = rng.integers(0, 128, (COUNT, 3, 7, 7, 3)) + rng.integers(0, 128, (COUNT, 3, 1, 1, 3))
    large = squares.astype(np.uint8).repeat(8, axis=2).repeat(8, axis=3)
    names = [i.name for i in get_task("eyelid").inputs]
    return [dict(zip(names, images, strict=True)) for images in large]


@pytest.fixture(scope="session")
def measured(tiny_checkpoint: Path, eyes: Eyes) -> list[dict[str, float]]:
    """Outputs of the trained model in PyTorch, {output: mm} per sample."""
    model, _ = load_checkpoint(tiny_checkpoint)
    rows = []
    for sample in eyes:
        pixels = {n: torch.from_numpy(i).permute(2, 0, 1)[None].float() for n, i in sample.items()}
        with torch.no_grad():
            rows.append({name: float(value) for name, value in model(pixels).items()})
    spread = np.ptp([list(row.values()) for row in rows], axis=0)
    # More than the budgets: a constant would not pass for a measurement.
    assert (spread > 0.1).all(), spread
    return rows
