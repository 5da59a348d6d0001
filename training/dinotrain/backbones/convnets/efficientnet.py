"""EfficientNet-B0 to B7: inverted residual blocks, scaled in width and depth together.

Both published forms: padding and epsilon are the config's. Parameter names are timm's. Source:
METHODS G.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from dinotrain.backbones.convnets.backbone import ConvNet
from dinotrain.backbones.convnets.config import ConvNetConfig, Stage
from dinotrain.backbones.convnets.layers import BatchNorm, conv2d

SE_SHARE = 0.25
"""Width of the squeeze, as a share of the block's input."""


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate worked out from the means of all channels."""

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, reduced, kernel_size=1)
        self.conv_expand = nn.Conv2d(reduced, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        means = x.mean(dim=(2, 3), keepdim=True)
        return x * self.conv_expand(F.silu(self.conv_reduce(means))).sigmoid()


class DepthwiseSeparable(nn.Module):
    """bn2 conv_pw se silu bn1 conv_dw x, plus x where shapes allow: a block without expansion."""

    def __init__(self, inputs: int, stage: Stage, stride: int, config: ConvNetConfig) -> None:
        super().__init__()
        eps, padding = config.norm_eps, config.padding
        self.has_skip = stride == 1 and inputs == stage.channels
        self.conv_dw = conv2d(inputs, inputs, stage.kernel, stride, inputs, padding)
        self.bn1 = BatchNorm(inputs, eps)
        self.se = SqueezeExcite(inputs, round(inputs * SE_SHARE))
        self.conv_pw = conv2d(inputs, stage.channels, kernel=1)
        self.bn2 = BatchNorm(stage.channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', H', W')."""
        inner = F.silu(self.bn1(self.conv_dw(x)))
        inner = self.bn2(self.conv_pw(self.se(inner)))
        return inner + x if self.has_skip else inner


class InvertedResidual(nn.Module):
    """bn3 conv_pwl se silu bn2 conv_dw silu bn1 conv_pw x, plus x where shapes allow."""

    def __init__(self, inputs: int, stage: Stage, stride: int, config: ConvNetConfig) -> None:
        super().__init__()
        eps, padding = config.norm_eps, config.padding
        inside = inputs * stage.expansion
        self.has_skip = stride == 1 and inputs == stage.channels
        self.conv_pw = conv2d(inputs, inside, kernel=1)
        self.bn1 = BatchNorm(inside, eps)
        self.conv_dw = conv2d(inside, inside, stage.kernel, stride, inside, padding)
        self.bn2 = BatchNorm(inside, eps)
        self.se = SqueezeExcite(inside, round(inputs * SE_SHARE))
        self.conv_pwl = conv2d(inside, stage.channels, kernel=1)
        self.bn3 = BatchNorm(stage.channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', H', W')."""
        inner = F.silu(self.bn1(self.conv_pw(x)))
        inner = F.silu(self.bn2(self.conv_dw(inner)))
        inner = self.bn3(self.conv_pwl(self.se(inner)))
        return inner + x if self.has_skip else inner


class EfficientNet(ConvNet):
    """Stem of stride 2, seven stages, and a 1×1 convolution before the pooling."""

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__(config)
        stem, last, width = config.stem_channels, config.stages[-1].channels, config.pooled_width
        self.conv_stem = conv2d(3, stem, kernel=3, stride=2, padding=config.padding)
        self.bn1 = BatchNorm(stem, config.norm_eps)
        self.blocks = nn.ModuleList(self._stages())
        self.conv_head = conv2d(last, width, kernel=1)
        self.bn2 = BatchNorm(width, config.norm_eps)

    def _stages(self) -> list[nn.Sequential]:
        inputs = self.config.stem_channels
        stages = []
        for stage in self.config.stages:
            kind = DepthwiseSeparable if stage.expansion == 1 else InvertedResidual
            blocks = []
            for index in range(stage.blocks):
                stride = stage.stride if index == 0 else 1
                blocks.append(kind(inputs, stage, stride, self.config))
                inputs = stage.channels
            stages.append(nn.Sequential(*blocks))
        return stages

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, stem_channels, ⌈H/2⌉, ⌈W/2⌉)."""
        return F.silu(self.bn1(self.conv_stem(images)))

    def stage_modules(self) -> Sequence[nn.Sequential]:
        """Return the seven stages."""
        return [stage for stage in self.blocks if isinstance(stage, nn.Sequential)]

    def project(self, x: Tensor) -> Tensor:
        """(B, C, h, w) → (B, pooled_width, h, w)."""
        return F.silu(self.bn2(self.conv_head(x)))

    def last_modules(self) -> Sequence[nn.Module]:
        """Return the last convolution and its normalisation."""
        return self.conv_head, self.bn2
