"""Convolutional backbones with random weights that keep every map alive."""

from collections.abc import Callable

import pytest
import torch

from dinotrain.backbones.convnets.backbone import ConvNet, estimate_statistics_, init_weights_
from dinotrain.backbones.convnets.config import ConvNetConfig
from dinotrain.backbones.convnets.table import build_convnet

SMALL = {
    "seresnet": ConvNetConfig(name="tiny", family="seresnet", width=0.25, depth=0.3),
    "efficientnet": ConvNetConfig(name="tiny", family="efficientnet", width=0.5, depth=0.5),
    "tf_efficientnet": ConvNetConfig(
        name="tiny", family="efficientnet", width=0.5, depth=0.5, padding="same", norm_eps=1e-3
    ),
}


@pytest.fixture(params=list(SMALL))
def small(request) -> ConvNetConfig:
    """Each family and form in turn, under a million parameters."""
    return SMALL[request.param]


@pytest.fixture(scope="package")
def randomised() -> Callable[..., ConvNet]:
    """Make a frozen model of an architecture with every tensor random, in evaluation mode."""

    def make(config: ConvNetConfig, seed: int = 0) -> ConvNet:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = init_weights_(build_convnet(config))
            with torch.no_grad():
                for value in (*model.parameters(), *model.buffers()):
                    if value.ndim == 1:
                        # Norms and biases must differ per channel, or a mix-up would not show.
                        value.mul_(1 + 0.2 * torch.rand_like(value))
                        value.add_(0.1 * torch.rand_like(value))
            estimate_statistics_(model, torch.randn(4, 3, 96, 96))
        return model.requires_grad_(False).eval()

    return make
