"""Run a deploy model on calibration pictures and keep what its layers read and give."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dinoexport.errors import BuildError
from dinoexport.quantize.calibration import (
    Calibration,
    CalibrationSet,
    LayerStatistics,
    TensorStatistics,
)
from dinoexport.quantize.layers import Weighted, quantises_activations, weighted_layers
from dinoexport.quantize.observers import (
    DEFAULT_OBSERVER,
    Histogram,
    MinMax,
    Observer,
    get_observer,
)

Note = Callable[[str, Tensor, Tensor], None]
"""Told (layer, what it reads, what it gives) at each run of a layer."""
Progress = Callable[[int, int], None]


def calibrate(
    model: nn.Module,
    pictures: CalibrationSet,
    observer: Observer | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Run a deploy model on pictures, one sample at a time, and watch its layers.

    What is kept is one histogram and two numbers per channel of a tensor, however many pictures
    there are.

    Args:
        model: a deploy model; float32, in eval mode.
        pictures: see ``pictures``.
        observer: chooses ranges; the default is that of ``get_observer``.
        progress: told (samples done, of how many).

    Raises:
        BuildError: a layer reads or gives numbers that are not finite, or the input of one that can
            be quantised is the same everywhere.
    """
    observer = observer or get_observer(DEFAULT_OBSERVER)
    modules = weighted_layers(model)
    watches: dict[str, tuple[_Watch, _Watch]] = {}

    def note(name: str, read: Tensor, given: Tensor) -> None:
        if name not in watches:
            # Others stay float: their histograms would cost time and choose nothing.
            used = observer if quantises_activations(name, modules[name]) else MinMax()
            watches[name] = (_Watch(modules[name], used), _Watch(modules[name], used))
        for watch, tensor, what in zip(
            watches[name], (read, given), ("reads", "gives"), strict=True
        ):
            if not watch.add(tensor):
                raise BuildError(
                    f"calibration: {name} {what} numbers that are not finite. "
                    "Train the model again, or give other pictures with --calibration."
                )

    with watched(modules, note):
        run_samples(model, pictures, progress)
    layers = {}
    for name, module in modules.items():
        if name not in watches:
            raise BuildError(
                f"calibration: {name} was never run, so nothing is known of its activations. "
                "Please report the checkpoint's configuration."
            )
        read, given = watches[name]
        if quantises_activations(name, module) and read.minimum == read.maximum:
            raise BuildError(
                f"calibration: {name} reads {read.minimum:g} everywhere, in all of "
                f"{len(pictures.samples)} samples, which is no range. Give other pictures with "
                "--calibration, or train the model again."
            )
        layers[name] = LayerStatistics(read.finish(), given.finish())
    return Calibration(layers, pictures, observer)


@torch.no_grad()
def run_samples(
    model: nn.Module, pictures: CalibrationSet, progress: Progress | None = None
) -> None:
    """Run a deploy model on each sample; what it gives is left to hooks."""
    with fused_attention(model):
        for done, sample in enumerate(pictures.samples, start=1):
            model(*to_pixels(model, sample))
            if progress is not None:
                progress(done, len(pictures.samples))


@contextmanager
def fused_attention(model: nn.Module) -> Iterator[None]:
    """Let attention that has the choice run by torch's own kernel, while it holds.

    What is captured are plain products. Run by torch they write a map of all tokens by all tokens,
    which at 518 px takes longer than all linear layers do.
    """
    able = [module for module in model.modules() if hasattr(module, "fused")]
    for module in able:
        module.fused = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in able:
            module.fused = False  # type: ignore[assignment]


def to_pixels(model: nn.Module, sample: Mapping[str, NDArray[np.uint8]]) -> list[Tensor]:
    """Return one sample as a deploy model reads it: (1, 3, H, W) float32, 0..255, per input."""
    names: list[str] = model.input_names  # type: ignore[assignment]
    weight = next(model.parameters())
    return [
        torch.from_numpy(np.ascontiguousarray(sample[name]))
        .to(weight.device)
        .permute(2, 0, 1)[None]
        .float()
        for name in names
    ]


@contextmanager
def watched(modules: Mapping[str, nn.Module], note: Note) -> Iterator[None]:
    """Tell of each run of some layers, while it holds."""

    def hook(name: str):
        def tell(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            note(name, inputs[0], output)

        return tell

    hooks = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


class _Watch:
    """One tensor while pictures come."""

    def __init__(self, module: Weighted, observer: Observer) -> None:
        self._axis = -1 if isinstance(module, nn.Linear) else 1
        self._observer = observer
        self._histogram = Histogram()
        self._low: Tensor | None = None
        self._high: Tensor | None = None
        self._shape: tuple[int, ...] = ()

    @property
    def minimum(self) -> float:
        return float(self._low.min()) if self._low is not None else 0.0

    @property
    def maximum(self) -> float:
        return float(self._high.max()) if self._high is not None else 0.0

    def add(self, tensor: Tensor) -> bool:
        """Take a tensor in; False if it has numbers that are not finite."""
        rows = tensor.movedim(self._axis, -1).reshape(-1, tensor.shape[self._axis])
        # NaN is the least and the largest of what it is among.
        low, high = rows.amin(dim=0), rows.amax(dim=0)
        if not bool((low.isfinite() & high.isfinite()).all()):
            return False
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)
        self._shape = tuple(tensor.shape)
        if self._observer.counts:
            self._histogram.add(tensor.cpu().numpy())
        return True

    def finish(self) -> TensorStatistics:
        if self._low is None or self._high is None:
            raise BuildError("calibration: there are no pictures. Give some with --calibration.")
        seen = self._histogram if self._observer.counts else Histogram(self.minimum, self.maximum)
        return TensorStatistics(
            shape=self._shape,
            range=self._observer.choose(seen),
            minimum=self.minimum,
            maximum=self.maximum,
            channel_minimum=self._low.cpu().numpy(),
            channel_maximum=self._high.cpu().numpy(),
        )
