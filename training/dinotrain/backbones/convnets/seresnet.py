"""SE-ResNet-50: bottleneck residual blocks with squeeze-and-excitation on their output.

As timm's ``seresnet50``: 7×7 stem, stride on the 3×3 convolution, a strided 1×1 convolution on the
shortcut, SE with the 16th part of the channels. Parameter names are timm's. Source: METHODS G.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from dinotrain.backbones.convnets.backbone import ConvNet
from dinotrain.backbones.convnets.config import ConvNetConfig, Stage
from dinotrain.backbones.convnets.layers import BatchNorm, conv2d

SE_REDUCTION = 16


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate worked out from the means of all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        reduced = max((channels // SE_REDUCTION + 4) // 8 * 8, 8)
        self.fc1 = nn.Conv2d(channels, reduced, kernel_size=1)
        self.fc2 = nn.Conv2d(reduced, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        means = x.mean(dim=(2, 3), keepdim=True)
        return x * self.fc2(F.relu(self.fc1(means))).sigmoid()


class Bottleneck(nn.Module):
    """relu(shortcut(x) + se(bn3 conv3 relu bn2 conv2 relu bn1 conv1 x))."""

    def __init__(self, inputs: int, stage: Stage, stride: int, eps: float) -> None:
        super().__init__()
        inside = stage.channels // stage.expansion
        self.conv1 = conv2d(inputs, inside, kernel=1)
        self.bn1 = BatchNorm(inside, eps)
        self.conv2 = conv2d(inside, inside, stage.kernel, stride)
        self.bn2 = BatchNorm(inside, eps)
        self.conv3 = conv2d(inside, stage.channels, kernel=1)
        self.bn3 = BatchNorm(stage.channels, eps)
        self.se = SqueezeExcite(stage.channels)
        self.downsample = None
        if stride > 1 or inputs != stage.channels:
            self.downsample = nn.Sequential(
                conv2d(inputs, stage.channels, kernel=1, stride=stride),
                BatchNorm(stage.channels, eps),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', H', W')."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.se(self.bn3(self.conv3(x))) + shortcut)


class SEResNet(ConvNet):
    """Stem of stride 4 and four stages; the last one's map is pooled."""

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__(config)
        self.conv1 = conv2d(3, config.stem_channels, kernel=7, stride=2)
        self.bn1 = BatchNorm(config.stem_channels, config.norm_eps)
        self.layer1, self.layer2, self.layer3, self.layer4 = self._stages()

    def _stages(self) -> list[nn.Sequential]:
        inputs = self.config.stem_channels
        stages = []
        for stage in self.config.stages:
            blocks = []
            for index in range(stage.blocks):
                stride = stage.stride if index == 0 else 1
                blocks.append(Bottleneck(inputs, stage, stride, self.config.norm_eps))
                inputs = stage.channels
            stages.append(nn.Sequential(*blocks))
        return stages

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, stem_channels, ⌈H/4⌉, ⌈W/4⌉)."""
        x = F.relu(self.bn1(self.conv1(images)))
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)

    def stage_modules(self) -> Sequence[nn.Sequential]:
        """Return the four stages."""
        return self.layer1, self.layer2, self.layer3, self.layer4

    def project(self, x: Tensor) -> Tensor:
        """Leave the last map as it is."""
        return x

    def last_modules(self) -> Sequence[nn.Module]:
        """Return nothing: the last map is pooled as it is."""
        return ()
