"""Outlier channels in half precision: the few inputs of a layer that reach farthest are multiplied
apart from the others, whose integers then need not reach as far.

    Before:  y = linear(x; W, b)
    After:   y = linear(x; W with zeros in the outliers' columns, b) + mix(pick(x))

``pick`` is a product with ones and zeros, which every target has, where a gather would split a
graph between delegate and CPU. Source: Dettmers et al., "LLM.int8()" (2022).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dinoexport.quantize.calibration import Calibration, TensorStatistics
from dinoexport.quantize.layers import Range, weighted_layers
from dinoexport.recipes import Activations, Precision

REACH = 8.0
"""Times the median channel's peak, from which on a channel is an outlier: it would cost the others
three of their eight bits."""
MOST = 16
"""Channels of a layer at most; more cost more than they save."""
PART = ".outliers"
NORMAL = ".normal"


class SplitLinear(nn.Module):
    """A linear layer in two parts.

    Args:
        linear: taken apart.
        channels: input channels that are multiplied in half precision.
    """

    def __init__(self, linear: nn.Linear, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.channels = channels
        self.normal = linear
        self.outliers = nn.Sequential()
        picks = torch.zeros(len(channels), linear.in_features)
        picks[torch.arange(len(channels)), list(channels)] = 1
        self.outliers.add_module("pick", _plain(picks.to(linear.weight)))
        self.outliers.add_module("mix", _plain(linear.weight[:, list(channels)].clone()))
        linear.weight[:, list(channels)] = 0

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in) → (B, T, out)."""
        return self.normal(x) + self.outliers(x)


@dataclass(frozen=True)
class Split:
    """What was split: the layer's name, and its outlier channels."""

    layer: str
    channels: tuple[int, ...]


@torch.no_grad()
def split_outliers_(
    model: nn.Module, calibration: Calibration, precisions: Mapping[str, Precision]
) -> list[Split]:
    """Split the outlier channels off every layer whose activations are quantised, in place.

    A layer ``blocks.5.mlp.fc1`` becomes ``blocks.5.mlp.fc1.normal`` and two small ones,
    ``blocks.5.mlp.fc1.outliers.pick`` and ``….mix``.

    Args:
        model: a deploy model whose weights are not yet rounded.
        calibration: of this model as it is.
        precisions: of its layers.

    Returns:
        Layers that have outliers, in running order.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    done = []
    for name, module in weighted_layers(model).items():
        if precisions[name].activations is Activations.FLOAT or not isinstance(module, nn.Linear):
            continue
        channels = find_outliers(calibration.layers[name].input)
        if not channels:
            continue
        parent, _, child = paths[id(module)].rpartition(".")
        setattr(model.get_submodule(parent), child, SplitLinear(module, channels))
        done.append(Split(name, channels))
    return done


def find_outliers(statistics: TensorStatistics) -> tuple[int, ...]:
    """Return the channels that reach ``REACH`` times as far as the median one; ``MOST`` at most."""
    peaks = statistics.channel_peaks
    median = float(np.median(peaks))
    if median == 0:
        return ()
    order = np.argsort(-peaks, kind="stable")[:MOST]
    return tuple(sorted(int(i) for i in order if peaks[i] > REACH * median))


def narrowed(limits: Range, statistics: TensorStatistics, channels: tuple[int, ...]) -> Range:
    """Return the part of a range that the channels besides outliers reach."""
    low = float(np.delete(statistics.channel_minimum, channels).min())
    high = float(np.delete(statistics.channel_maximum, channels).max())
    return max(limits[0], min(low, 0.0)), min(limits[1], max(high, 0.0))


def _plain(weight: Tensor) -> nn.Linear:
    outs, ins = weight.shape
    linear = nn.Linear(ins, outs, bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
