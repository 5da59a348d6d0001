"""Frozen features of a data set, computed once per picture and kept on disk.

One entry per picture and draw of its augmentation, keyed by everything that its numbers depend on,
so that it can be shared between runs and never be wrong for one; ``feature_cache`` keeps them. What
is missing or damaged there is computed again. Source: METHODS B7.
"""

import hashlib
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dinotrain.data.augment import sample_stream
from dinotrain.data.dataset import Dataset, Sample, load_image
from dinotrain.errors import DataError, WeightsError
from dinotrain.feature_cache import DTYPES, FeatureCache, Precision
from dinotrain.heads.pool import Features
from dinotrain.model import TaskModel
from dinotrain.pace import Pace
from dinotrain.sources import Batch, Dropped

CACHE_VERSION = 2
MEMORY_BYTES = 2 * 2**30
"""Features above this sum stay on disk and are read per batch."""
SHOWN = 10


class Progress(Protocol):
    """Called as work goes on; ``done`` of ``total`` units of a stage, and a few words.

    Where ``total`` is 0 there is no work, only the words: a remark on a line of its own.
    """

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Tell how far a stage is."""


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """Tell nothing."""


def default_cache() -> Path:
    """Return the folder for cached features: DINOEXPORT_CACHE, else the platform's cache folder."""
    named = os.environ.get("DINOEXPORT_CACHE")
    if named:
        return Path(named) / "features"
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "dinoexport" / "features"


def weights_digest(model: nn.Module, config: msgspec.Struct) -> str:
    """sha256 over an architecture and its weights, as hex; independent of any file."""
    total = hashlib.sha256(msgspec.json.encode(config))
    for name, value in sorted(model.state_dict().items()):
        total.update(f"{name}|{value.dtype}|{tuple(value.shape)}".encode())
        total.update(_bytes(value))
    return total.hexdigest()


class FeatureStore:
    """What the frozen part of a model gives for pictures, from memory, from disk, or computed.

    Args:
        model: its backbone and pool compute; eval mode. Moved nowhere: pictures come to its device.
        cache: folder of the entries, made when first written to.
        copies: of each training picture, each with an augmentation of its own; 0 is none.
        seed: of the augmentation.
        precision: of the numbers on disk.

    On a CPU pictures go through one by one: then an entry depends on its picture alone, to the last
    bit, whatever else was in the set.
    """

    def __init__(
        self,
        model: TaskModel,
        cache: Path,
        copies: int = 0,
        seed: int = 0,
        precision: Precision = "float32",
    ) -> None:
        self.model = model
        self.cache = FeatureCache(cache, precision)
        self.copies = copies
        self.seed = seed
        self.backbone_digest = weights_digest(model.backbone, model.config.backbone)
        self.computed = 0
        """Pictures that were not found in the cache."""
        self._memory: dict[str, Features] = {}
        self._held_bytes = 0
        config = model.config
        self._prefix = msgspec.json.encode(
            [
                CACHE_VERSION,
                self.backbone_digest,
                config.image_size,
                config.features,
                config.mean,
                config.std,
            ]
        )

    def key(self, sample: Sample, name: str, copy: int = 0) -> str:
        """sha256 over all that the features of a picture depend on, as hex.

        Args:
            sample: whose picture.
            name: of the input.
            copy: which draw of the augmentation; 0 is the picture as it is.
        """
        image = sample.images[name]
        parts = [self._prefix, image.digest.encode(), image.crop_key.encode()]
        if copy:
            # The draw is the sample's: all its pictures change together.
            drawn = [self.model.config.task, self.seed, copy, sample.name, sorted(sample.images)]
            parts.append(msgspec.json.encode(drawn))
        return hashlib.sha256(b"\x1f".join(parts)).hexdigest()

    def entry(self, sample: Sample, name: str, copy: int = 0) -> Path:
        """Return the file of a picture's features."""
        return self.cache.entry(self.key(sample, name, copy))

    def prepare(
        self, dataset: Dataset, progress: Progress = silent, shard: tuple[int, int] = (0, 1)
    ) -> None:
        """Compute what is missing, of training samples every copy.

        Args:
            dataset: all samples that will be asked for.
            progress: told of the stage "features".
            shard: (number of this process, how many there are); each computes its part.

        Raises:
            DataError: pictures that cannot be decoded; up to ten are named.
            WeightsError: the backbone gives NaN or infinity.
            UsageError: the cache folder cannot be written to.
        """
        wanted = [
            _Wanted(sample, name, copy)
            for sample in dataset.samples
            for copy in range(1 + (self.copies if sample.split == "train" else 0))
            for name in sample.images
        ][shard[0] :: shard[1]]
        missing: list[_Wanted] = []
        for item in wanted:
            found = self.cache.get(self.key(*item))
            if found is None:
                missing.append(item)
            else:
                self._hold(self.key(*item), found)
        pace, cached = Pace("pictures"), len(wanted) - len(missing)
        done = cached
        progress("features", done, len(wanted), f"{done} cached")
        problems: list[str] = []
        for batch in _batches(missing, self._batch_size()):
            self._compute(batch, problems)
            done += len(batch)
            progress("features", done, len(wanted), pace.note(done - cached))
        if problems:
            more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
            raise DataError(";\n  ".join([*problems[:SHOWN], *more]))

    def get(self, sample: Sample, name: str, copy: int = 0) -> Features:
        """Features of one picture, float32 on the CPU."""
        key = self.key(sample, name, copy)
        held = self._memory.get(key)
        if held is not None:
            return held
        found = self.cache.get(key)
        if found is None:
            problems: list[str] = []
            computed = self._compute([_Wanted(sample, name, copy)], problems)
            if problems:
                raise DataError(problems[0])
            found = computed[0]
        self._hold(key, found)
        return found

    def batch(
        self, samples: Sequence[Sample], dropped: Dropped | None = None, epoch: int | None = None
    ) -> Batch:
        """Stack the features of some samples, zeros where a picture is missing; see ``Source``."""
        copy = 0 if epoch is None or not self.copies else 1 + (epoch - 1) % self.copies
        inputs, present = {}, {}
        example = self.get(samples[0], next(iter(samples[0].images)), copy)
        zeros = tuple(torch.zeros_like(value) for value in example)
        for spec in self.model.task.inputs:
            found: list[Features | None] = []
            for index, sample in enumerate(samples):
                hidden = dropped is not None and spec.optional and dropped(index, spec.name)
                there = spec.name in sample.images and not hidden
                found.append(self.get(sample, spec.name, copy) if there else None)
            rows = [zeros if value is None else value for value in found]
            inputs[spec.name] = tuple(torch.stack(parts) for parts in zip(*rows, strict=True))
            present[spec.name] = torch.tensor([value is not None for value in found])
        return Batch(inputs, present, torch.from_numpy(self._truth(samples, copy)))

    def _truth(self, samples: Sequence[Sample], copy: int) -> NDArray[Any]:
        task, size = self.model.task, self.model.config.image_size
        if not copy or not task.truth_moves:
            return task.truth(samples, size)
        rows = [task.load(s, size, sample_stream(self.seed, copy, s.name))[1] for s in samples]
        return np.stack(rows)

    def _batch_size(self) -> int:
        return 1 if self._device().type == "cpu" else 32

    def _device(self) -> torch.device:
        return next(self.model.backbone.parameters()).device

    def _pixels(self, item: "_Wanted") -> Tensor:
        """(3, H, W) uint8."""
        sample, name, copy = item
        size = self.model.config.image_size
        if not copy:
            pixels = load_image(sample.images[name], size)
        else:
            stream = sample_stream(self.seed, copy, sample.name)
            pixels = np.ascontiguousarray(self.model.task.load(sample, size, stream)[0][name])
        return torch.from_numpy(pixels).permute(2, 0, 1)

    @torch.inference_mode()
    def _compute(self, items: "Sequence[_Wanted]", problems: list[str]) -> list[Features]:
        """Compute, keep and write some pictures; those that cannot be read go to ``problems``."""
        readable, pixels = [], []
        for item in items:
            try:
                pixels.append(self._pixels(item))
            except DataError as error:
                problems.append(str(error))
                continue
            readable.append(item)
        if not readable:
            return []
        # A GPU's convolutions default to TF32, ten bits of mantissa: an entry from one would not
        # serve a CPU.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            extracted = self.model.extract(torch.stack(pixels).to(self._device()))
        values = [value.float().cpu() for value in extracted]
        self.computed += len(readable)
        result = []
        for index, item in enumerate(readable):
            # A clone outside of inference mode's bookkeeping: heads train on it.
            with torch.inference_mode(False):
                found = tuple(value[index].clone() for value in values)
            if not all(bool(value.isfinite().all()) for value in found):
                raise WeightsError(
                    f"the backbone {self.model.config.backbone.name} gives NaN or infinity for "
                    f"{item.sample.images[item.name].path}. Fetch its weights again."
                )
            key = self.key(*item)
            self.cache.put(key, found)
            if self.cache.dtype != "float32":
                # As a later run will read it, so that both train on the same numbers.
                dtype = DTYPES[self.cache.dtype]
                found = tuple(value.to(dtype).float() for value in found)
            self._hold(key, found)
            result.append(found)
        return result

    def _hold(self, key: str, value: Features) -> None:
        size = sum(part.nbytes for part in value)
        if key not in self._memory and self._held_bytes + size <= MEMORY_BYTES:
            self._held_bytes += size
            self._memory[key] = value


class _Wanted(NamedTuple):
    """One entry: which picture of which sample, and which draw of its augmentation."""

    sample: Sample
    name: str
    copy: int


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _batches(items: Sequence[_Wanted], size: int) -> Iterable[Sequence[_Wanted]]:
    return (items[start : start + size] for start in range(0, len(items), size))
