"""Pictures, and what the trained model itself measures on them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from dinotrain.checkpoint import load_checkpoint
from dinotrain.tasks import get_task

Eyes = list[dict[str, np.ndarray]]
Damaged = Callable[..., Path]
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


@pytest.fixture
def damaged(tmp_path: Path) -> Damaged:
    """Damage a copy of a file: ``damaged(file, how, own)``, of own contents by name."""

    def make(file: Path, how: str, own: Mapping[str, bytes]) -> Path:
        content = file.read_bytes()
        path = tmp_path / f"damaged{file.suffix}"
        if how == "missing":
            return path
        contents = {
            "empty": b"",
            "text": b"this is no model at all\n" * 40,
            "zeros": bytes(len(content)),
            "start": content[:300],
            "half": content[: len(content) // 2],
            "almost": content[:-100],
            **own,
        }
        path.write_bytes(contents[how])
        return path

    return make
