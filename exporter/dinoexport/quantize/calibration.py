"""What the layers of a model were seen to do on calibration pictures."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dinoexport.quantize.layers import Range


@dataclass(frozen=True)
class TensorStatistics:
    """One tensor over all calibration pictures.

    Attributes:
        shape: of one picture's.
        range: what an observer chose to clip to.
        minimum: seen.
        maximum: seen.
        channel_peaks: (channels,) float32, the largest absolute value of each channel.
    """

    shape: tuple[int, ...]
    range: Range
    minimum: float
    maximum: float
    channel_peaks: NDArray[np.float32]


@dataclass(frozen=True)
class LayerStatistics:
    """What a layer reads and gives."""

    input: TensorStatistics
    output: TensorStatistics


@dataclass(frozen=True)
class Calibration:
    """Statistics of every layer, and the pictures that they come from.

    Attributes:
        layers: by name.
        source: what the pictures were read from, as the user gave it.
        count: of samples.
        seed: of their choice.
        sha256: over their pixels, in order.
        observer: how ranges were chosen.
    """

    layers: dict[str, LayerStatistics]
    source: str
    count: int
    seed: int
    sha256: str
    observer: str
