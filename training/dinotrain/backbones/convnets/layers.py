"""Layers that both convolutional families share, with static padding for export.

Parameter names are those of timm's files. Source: METHODS G.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinotrain.backbones.convnets.config import Padding

NORM_MOMENTUM = 0.1
"""Share of a batch in the running statistics, where they are live."""


class BatchNorm(nn.Module):
    """Batch normalisation by stored statistics, in training too unless ``live`` is set.

    Live statistics of few images are noise (METHODS G); weight and bias train either way. Under
    several processes each one's live statistics are its own. Unlike torch's it counts no batches:
    nothing reads that number, and every tensor of the state is of floating point.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.live = False
        self.momentum = NORM_MOMENTUM
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=self.training and self.live,
            momentum=self.momentum,
            eps=self.eps,
        )


class SameConv2d(nn.Conv2d):
    """A strided convolution with TensorFlow's SAME padding, worked out from the input's size.

    The sizes are integers when a graph is captured, so that the padding is a constant there.
    """

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(B, C, H, W) → (B, C', ⌈H / stride⌉, ⌈W / stride⌉)."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        top, bottom = same_padding(x.shape[-2], kernel, stride)
        left, right = same_padding(x.shape[-1], kernel, stride)
        if top == bottom and left == right:
            padding = (top, left)
        else:
            x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
        return F.conv2d(x, self.weight, self.bias, stride, padding, groups=self.groups)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Pixels before and after one axis so that ⌈size / stride⌉ come out; the odd one goes after."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def conv2d(
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    padding: Padding = "symmetric",
) -> nn.Conv2d:
    """Make a convolution without bias, as those before a normalisation are; odd kernels."""
    if padding == "same" and stride > 1:
        return SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
