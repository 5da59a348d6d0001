"""Models of random weights in every shape that a checkpoint may have, and random pictures."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from dinotrain.backbones.vit import ViTConfig, init_weights_
from dinotrain.model import ModelConfig, TaskModel

# ViT-S in small: several heads, an MLP four times as wide.
SMALL = ViTConfig(
    name="small", embed_dim=48, depth=4, heads=3, ffn_dim=192, grid=(4, 4), position_rule="scale"
)


def _set_everything(model: TaskModel, seed: int) -> None:
    """No parameter keeps an initial value (0 or 1) at which a forgotten one would not show."""
    generator = torch.Generator().manual_seed(seed)
    init_weights_(model.backbone)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for member in model.head.members:
            for branch in member.values():
                branch[-1].weight.mul_(4)
    if model.config.encoding.kind == "scalar":
        model.decoder.mean.copy_(torch.tensor([2.0, 5.0, 11.0]))
        model.decoder.std.copy_(torch.tensor([1.5, 2.5, 4.0]))


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Models this small lose more by sharing work than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def random_model() -> Callable[..., TaskModel]:
    """Make a model of random weights, in eval mode; arguments change its ModelConfig."""

    def make(seed: int = 0, **changes) -> TaskModel:
        torch.manual_seed(seed)
        model = TaskModel(
            ModelConfig(
                **{"task": "eyelid", "backbone": SMALL, "image_size": (56, 56)} | changes  # type: ignore[arg-type]
            )
        )
        _set_everything(model, seed)
        return model.eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def random_pixels() -> Callable[..., tuple[Tensor, ...]]:
    """Give (1, 3, H, W) float32 pixels of whole numbers 0..255, one per input of the task."""

    def make(seed: int, image_size: tuple[int, int]) -> tuple[Tensor, ...]:
        values = np.random.default_rng(seed).integers(0, 256, (3, 1, 3, *image_size))
        return tuple(torch.from_numpy(values.astype(np.float32)))

    return make
