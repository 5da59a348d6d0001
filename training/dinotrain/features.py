"""Frozen features of a data set, computed once per picture and kept on disk.

One file per picture, keyed by everything that its numbers depend on, so that an entry can be
shared between runs and never be wrong for one. A missing, partial or corrupt entry is computed
again. Source: METHODS B7.
"""

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dinotrain.data.dataset import Dataset, ImageRef, Sample, load_image
from dinotrain.errors import DataError, UsageError, WeightsError
from dinotrain.model import TaskModel

CACHE_VERSION = 1
MEMORY_BYTES = 2 * 2**30
"""Features above this sum stay on disk and are read per batch."""
SHOWN = 10


class Progress(Protocol):
    """Called as work goes on; ``done`` of ``total`` units of a stage, and a few words."""

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

    On a CPU pictures go through one by one: then an entry depends on its picture alone, to the last
    bit, whatever else was in the set.
    """

    def __init__(self, model: TaskModel, cache: Path) -> None:
        self.model = model
        self.cache = cache
        self.backbone_digest = weights_digest(model.backbone, model.config.backbone)
        self.computed = 0
        """Pictures that were not found in the cache."""
        self._memory: dict[str, Tensor] = {}
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

    def key(self, image: ImageRef) -> str:
        """sha256 over all that the features of a picture depend on, as hex."""
        parts = (self._prefix, image.digest.encode(), image.crop_key.encode())
        return hashlib.sha256(b"\x1f".join(parts)).hexdigest()

    def entry(self, image: ImageRef) -> Path:
        """Return the file of a picture's features."""
        key = self.key(image)
        return self.cache / key[:2] / f"{key}.safetensors"

    def prepare(self, dataset: Dataset, progress: Progress = silent) -> None:
        """Compute what is missing.

        Raises:
            DataError: pictures that cannot be decoded; up to ten are named.
            WeightsError: the backbone gives NaN or infinity.
            UsageError: the cache folder cannot be written to.
        """
        images = [image for sample in dataset.samples for image in sample.images.values()]
        missing: list[ImageRef] = []
        for image in images:
            found = self._read(image)
            if found is None:
                missing.append(image)
            else:
                self._hold(image, found)
        done = len(images) - len(missing)
        progress("features", done, len(images), f"{done} cached")
        problems: list[str] = []
        for batch in _batches(missing, self._batch_size()):
            self._compute(batch, problems)
            done += len(batch)
            progress("features", done, len(images))
        if problems:
            more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
            raise DataError(";\n  ".join([*problems[:SHOWN], *more]))

    def get(self, image: ImageRef) -> Tensor:
        """Features of one picture, float32 on the CPU."""
        held = self._memory.get(self.key(image))
        if held is not None:
            return held
        found = self._read(image)
        if found is None:
            problems: list[str] = []
            computed = self._compute([image], problems)
            if problems:
                raise DataError(problems[0])
            found = computed[0]
        self._hold(image, found)
        return found

    def batch(
        self, samples: Sequence[Sample], dropped: Callable[[int, str], bool] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Stack the features of some samples.

        Args:
            samples: at least one.
            dropped: tells whether the input of a sample is to be withheld.

        Returns:
            {input: (B, ...)} with zeros where a picture is missing, and {input: (B,) bool}, True
            where it is there.
        """
        features, present = {}, {}
        example = self.get(next(iter(samples[0].images.values())))
        zeros = torch.zeros_like(example)
        for spec in self.model.task.inputs:
            found: list[Tensor | None] = []
            for index, sample in enumerate(samples):
                image = sample.images.get(spec.name)
                hidden = dropped is not None and spec.optional and dropped(index, spec.name)
                found.append(None if image is None or hidden else self.get(image))
            features[spec.name] = torch.stack([zeros if f is None else f for f in found])
            present[spec.name] = torch.tensor([f is not None for f in found])
        return features, present

    def _batch_size(self) -> int:
        return 1 if self._device().type == "cpu" else 32

    def _device(self) -> torch.device:
        return next(self.model.backbone.parameters()).device

    @torch.inference_mode()
    def _compute(self, images: Sequence[ImageRef], problems: list[str]) -> list[Tensor]:
        """Compute, keep and write some pictures; those that cannot be read go to ``problems``."""
        readable, pixels = [], []
        for image in images:
            try:
                loaded = load_image(image, self.model.config.image_size)
            except DataError as error:
                problems.append(str(error))
                continue
            readable.append(image)
            pixels.append(torch.from_numpy(loaded).permute(2, 0, 1))
        if not readable:
            return []
        # A GPU's convolutions default to TF32, ten bits of mantissa: an entry from one would not
        # serve a CPU.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            values = self.model.extract(torch.stack(pixels).to(self._device())).float().cpu()
        self.computed += len(readable)
        result = []
        for image, value in zip(readable, values, strict=True):
            if not bool(value.isfinite().all()):
                raise WeightsError(
                    f"the backbone {self.model.config.backbone.name} gives NaN or infinity for "
                    f"{image.path}. Fetch its weights again."
                )
            # A clone outside of inference mode's bookkeeping: heads train on it.
            with torch.inference_mode(False):
                value = value.clone()
            self._write(image, value)
            self._hold(image, value)
            result.append(value)
        return result

    def _hold(self, image: ImageRef, value: Tensor) -> None:
        if self._held_bytes + value.nbytes <= MEMORY_BYTES:
            key = self.key(image)
            self._held_bytes += value.nbytes if key not in self._memory else 0
            self._memory[key] = value

    def _read(self, image: ImageRef) -> Tensor | None:
        """Return an entry, or None when it is missing or is not what was written."""
        path = self.entry(image)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                value = file.get_tensor("features")
                stated = (file.metadata() or {}).get("sha256")
        except (SafetensorError, OSError, ValueError):
            return None
        return value if stated == hashlib.sha256(_bytes(value)).hexdigest() else None

    def _write(self, image: ImageRef, value: Tensor) -> None:
        path = self.entry(image)
        metadata = {"sha256": hashlib.sha256(_bytes(value)).hexdigest()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
            os.close(handle)
            partial = Path(name)
            try:
                save_file({"features": value.contiguous()}, partial, metadata=metadata)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            raise UsageError(
                f"{self.cache}: features cannot be cached there ({error}). Free some space, or "
                "name another folder with --cache."
            ) from error


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _batches(images: Sequence[ImageRef], size: int) -> Iterable[Sequence[ImageRef]]:
    return (images[start : start + size] for start in range(0, len(images), size))
