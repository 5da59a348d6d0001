"""What the layers of a model were seen to do on calibration pictures, and what of it is kept.

``pictures`` reads the pictures, ``collect`` runs the model on them, ``prepare`` uses what is found,
and ``calibration.json`` in a bundle records it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from dinoexport.errors import BundleError
from dinoexport.quantize.layers import Layer, Range
from dinoexport.quantize.observers import Observer

RECORD = "calibration.json"
"""Name of the record in a bundle."""
FORMAT_VERSION = 1


@dataclass(frozen=True)
class CalibrationSet:
    """The pictures that a model is calibrated on.

    Attributes:
        samples: {input: (H, W, 3) uint8} each, every input of the task, of the model's size.
        source: what they were read from, in a few words.
        seed: of their choice.
        sha256: over their pixels, in order.
    """

    samples: tuple[dict[str, NDArray[np.uint8]], ...]
    source: str
    seed: int
    sha256: str


@dataclass(frozen=True)
class TensorStatistics:
    """One tensor over all calibration pictures.

    Attributes:
        shape: of one run's; the first axis is one picture each.
        range: what an observer chose to clip to; holds zero, and is never empty.
        minimum: seen.
        maximum: seen.
        channel_minimum: (channels,) float32, of each channel: the last axis of what a linear layer
            reads and gives, the second of a convolution's.
        channel_maximum: (channels,) float32.
    """

    shape: tuple[int, ...]
    range: Range
    minimum: float
    maximum: float
    channel_minimum: NDArray[np.float32]
    channel_maximum: NDArray[np.float32]

    @property
    def channel_peaks(self) -> NDArray[np.float32]:
        """(channels,) float32, the largest absolute value of each channel."""
        return np.maximum(-self.channel_minimum, self.channel_maximum)

    @property
    def peak(self) -> float:
        """Return the largest absolute value seen."""
        return max(-self.minimum, self.maximum)

    @property
    def peak_ratio(self) -> float:
        """How far the farthest channel reaches beyond the median one: 1 where all are alike.

        Hundreds are outlier channels; 0 where the median channel is always zero.
        """
        median = float(np.median(self.channel_peaks))
        return float(self.channel_peaks.max()) / median if median else 0.0


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
        pictures: that the model was run on; modifiers of a recipe run it on them again.
        observer: how ranges were chosen.
    """

    layers: dict[str, LayerStatistics]
    pictures: CalibrationSet
    observer: Observer


class TensorRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One tensor as a bundle records it; see ``TensorStatistics``."""

    shape: tuple[int, ...]
    minimum: float
    maximum: float
    range: tuple[float, float]
    peak_ratio: float
    """Peak of the farthest channel over that of the median one."""


class LayerRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One layer as a bundle records it: as the trained model has it, and the ranges that ship."""

    input: TensorRecord
    output: TensorRecord
    precision: str
    input_range: tuple[float, float] | None = None
    """That ships, after all modifiers; None where activations are not quantised by calibration."""
    output_range: tuple[float, float] | None = None


class CalibrationRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What was calibrated on what: ``calibration.json`` of a bundle."""

    format_version: int = FORMAT_VERSION
    recipe: str
    source: str
    count: int
    seed: int
    sha256: str
    """Over the pixels of all samples, in order; see ``pictures.set_digest``."""
    observer: str
    layers: dict[str, LayerRecord]


def record_calibration(
    calibration: Calibration, recipe: str, layers: Mapping[str, Layer]
) -> CalibrationRecord:
    """Return what a bundle keeps of a calibration.

    Args:
        calibration: that the model was prepared with.
        recipe: its name.
        layers: what ``prepare_`` gave; a layer of which modifiers made two is found by its first.
    """
    pictures = calibration.pictures
    records = {}
    for name, statistics in calibration.layers.items():
        layer = layers.get(name) or layers.get(f"{name}.normal")
        records[name] = LayerRecord(
            input=_record(statistics.input),
            output=_record(statistics.output),
            precision=layer.precision.name if layer else "",
            input_range=_short(layer.input_range) if layer else None,
            output_range=_short(layer.output_range) if layer else None,
        )
    return CalibrationRecord(
        recipe=recipe,
        source=pictures.source,
        count=len(pictures.samples),
        seed=pictures.seed,
        sha256=pictures.sha256,
        observer=calibration.observer.label,
        layers=records,
    )


def write_record(folder: Path, record: CalibrationRecord) -> Path:
    """Write ``calibration.json`` into a bundle's folder; the same record gives the same bytes."""
    path = folder / RECORD
    path.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1))
    return path


def read_record(path: Path) -> CalibrationRecord:
    """Read ``calibration.json``.

    Raises:
        BundleError: it is missing, corrupt or of another version.
    """
    try:
        record = msgspec.json.decode(path.read_bytes(), type=CalibrationRecord)
    except (OSError, msgspec.MsgspecError) as error:
        raise BundleError(
            f"{path}: not a record of a calibration: {error}. Build again."
        ) from error
    if record.format_version != FORMAT_VERSION:
        raise BundleError(
            f"{path}: calibration format {record.format_version}, this version reads "
            f"{FORMAT_VERSION}. Build again."
        )
    return record


def _record(tensor: TensorStatistics) -> TensorRecord:
    return TensorRecord(
        shape=tensor.shape,
        minimum=_rounded(tensor.minimum),
        maximum=_rounded(tensor.maximum),
        range=(_rounded(tensor.range[0]), _rounded(tensor.range[1])),
        peak_ratio=float(f"{tensor.peak_ratio:.3g}"),
    )


def _short(limits: Range | None) -> Range | None:
    return None if limits is None else (_rounded(limits[0]), _rounded(limits[1]))


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
