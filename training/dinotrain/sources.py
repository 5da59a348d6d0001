"""What a training step reads: samples as tensors, from pictures or from the cache of features.

Both kinds have one method, ``batch``, so that the loop does not ask whether the backbone is frozen.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dinotrain.data.augment import sample_stream
from dinotrain.data.dataset import Sample
from dinotrain.heads.pool import Features
from dinotrain.tasks.base import Task

if TYPE_CHECKING:
    from dinotrain.tasks.base import Loaded

Dropped = Callable[[int, str], bool]
"""Tells whether an input of a sample, by its place in the batch, is to be withheld."""


class Batch(NamedTuple):
    """Some samples: {input: (B, …) each}, {input: (B,) bool}, and what the task compares with."""

    inputs: dict[str, Features]
    present: dict[str, Tensor]
    truth: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Move everything to a device."""
        return Batch(
            {name: tuple(x.to(device) for x in value) for name, value in self.inputs.items()},
            {name: value.to(device) for name, value in self.present.items()},
            self.truth.to(device),
        )


class Source(Protocol):
    """Gives samples as tensors on the CPU."""

    def batch(
        self, samples: Sequence[Sample], dropped: Dropped | None = None, epoch: int | None = None
    ) -> Batch:
        """Return some samples.

        Args:
            samples: at least one.
            dropped: which inputs are withheld; zeros stand in their place.
            epoch: from 1 on, draws the augmentation; None leaves pictures as they are.
        """
        ...


class Pictures:
    """Samples as pictures, for a backbone that trains: {input: ((B, 3, H, W) float32, 0..255)}.

    Args:
        task: loads and augments.
        image_size: (height, width) in pixels.
        seed: of the augmentation.
        augment: whether training pictures change from epoch to epoch.
    """

    def __init__(
        self, task: Task, image_size: tuple[int, int], seed: int = 0, augment: bool = False
    ) -> None:
        self.task = task
        self.image_size = image_size
        self.seed = seed
        self.augment = augment
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))

    def batch(
        self, samples: Sequence[Sample], dropped: Dropped | None = None, epoch: int | None = None
    ) -> Batch:
        """See ``Source``."""
        loaded = list(self._pool.map(lambda sample: self._load(sample, epoch), samples))
        inputs, present = {}, {}
        zeros = np.zeros((*self.image_size, 3), dtype=np.uint8)
        for spec in self.task.inputs:
            found = [pixels.get(spec.name) for pixels, _ in loaded]
            if dropped is not None and spec.optional:
                found = [None if dropped(i, spec.name) else x for i, x in enumerate(found)]
            stacked = np.stack([zeros if x is None else x for x in found])
            inputs[spec.name] = (torch.from_numpy(stacked).permute(0, 3, 1, 2).float(),)
            present[spec.name] = torch.tensor([x is not None for x in found])
        truth = torch.from_numpy(np.stack([row for _, row in loaded]))
        return Batch(inputs, present, truth)

    def _load(self, sample: Sample, epoch: int | None) -> "Loaded":
        stream = None
        if self.augment and epoch is not None:
            stream = sample_stream(self.seed, epoch, sample.name)
        return self.task.load(sample, self.image_size, stream)
