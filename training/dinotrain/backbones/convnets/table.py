"""Config → model: the families of convolutional backbones."""

import torch

from dinotrain.backbones.convnets.backbone import ConvNet
from dinotrain.backbones.convnets.config import ConvNetConfig, Family
from dinotrain.backbones.convnets.efficientnet import EfficientNet
from dinotrain.backbones.convnets.seresnet import SEResNet

FAMILIES: dict[Family, type[ConvNet]] = {"seresnet": SEResNet, "efficientnet": EfficientNet}


def build_convnet(config: ConvNetConfig) -> ConvNet:
    """Make a backbone of an architecture, with torch's default weights."""
    return FAMILIES[config.family](config)


def expected_shapes(config: ConvNetConfig) -> dict[str, tuple[int, ...]]:
    """Return keys and shapes of an architecture, without allocating a tensor."""
    with torch.device("meta"):
        model = build_convnet(config)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}
