"""BatchNorm folded into the convolution before it, for the deploy graph.

With stored statistics a normalisation is one factor and one offset per channel.
"""

import copy

from torch import nn
from torch.nn.utils import fuse_conv_bn_weights

from dinotrain.backbones.convnets.backbone import ConvNet
from dinotrain.backbones.convnets.layers import BatchNorm
from dinotrain.errors import UsageError


def fold_batch_norms(model: ConvNet) -> ConvNet:
    """Return a copy whose normalisations are part of their convolutions, for inference only.

    Equal to the original up to rounding, whatever the padding: it happens before the convolution.

    Raises:
        UsageError: the statistics are live, or the model was folded before.
    """
    if any(isinstance(module, BatchNorm) and module.live for module in model.modules()):
        raise UsageError(f"{model.config.name}: live BatchNorm statistics cannot be folded")
    folded = copy.deepcopy(model).eval()
    pairs = [pair for parent in folded.modules() for pair in _pairs(parent)]
    if not pairs:
        raise UsageError(f"{model.config.name} has no BatchNorm; it was folded before")
    for parent, name, conv, norm in pairs:
        conv.weight, bias = fuse_conv_bn_weights(
            conv.weight,
            conv.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        conv.register_parameter("bias", bias)
        setattr(parent, name, nn.Identity())
    return folded


def _pairs(parent: nn.Module) -> list[tuple[nn.Module, str, nn.Conv2d, BatchNorm]]:
    """Find each normalisation and the convolution registered right before it."""
    found = []
    before = None
    for name, child in parent.named_children():
        if isinstance(child, BatchNorm) and isinstance(before, nn.Conv2d):
            found.append((parent, name, before, child))
        before = child
    return found
