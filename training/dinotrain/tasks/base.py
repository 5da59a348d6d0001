"""What a task is: its images, its targets with units and ranges, its data, and its parity.

Nothing outside this folder asks which task it has.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

    from dinotrain.data.dataset import Dataset


class TaskInput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One image that the model reads; ``optional`` ones may be missing in training data."""

    name: str
    description: str
    optional: bool = False


class TargetSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One measured quantity with its unit and the range [low, low + span) that can be encoded."""

    name: str
    unit: str
    low: float
    span: float
    description: str

    @property
    def output_name(self) -> str:
        """Name of the value in every artifact, with its unit."""
        return f"{self.name}_{self.unit}"

    @property
    def std_name(self) -> str:
        """Name of the value's standard deviation, with its unit."""
        return f"{self.name}_std_{self.unit}"


class Branch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Targets that read the same vector, which is ``inputs_read`` pooled features wide."""

    name: str
    targets: tuple[str, ...]
    inputs_read: int


class Task(ABC):
    """One measurement problem. Subclasses are final."""

    name: str
    summary: str
    inputs: tuple[TaskInput, ...]
    targets: tuple[TargetSpec, ...]
    branches: tuple[Branch, ...]
    window_mm: float
    budgets_mm: dict[str, float]
    """Largest error per precision that parity accepts, in the targets' unit."""

    @abstractmethod
    def combine(self, features: "dict[str, Tensor]") -> "dict[str, Tensor]":
        """{input: (B, F)} pooled features → {branch: (B, inputs_read·F)}."""

    @abstractmethod
    def read(self, path: Path, *, image_size: tuple[int, int], seed: int = 0) -> "Dataset":
        """Read labelled data, checked, split by subject."""

    @abstractmethod
    def synthesise(
        self, count: int, seed: int, out: Path, progress: Callable[[int, int], None] | None = None
    ) -> Path:
        """Write a synthetic data set that ``read`` reads; returns its manifest."""

    @abstractmethod
    def render_samples(
        self, count: int, image_size: tuple[int, int]
    ) -> "list[dict[str, np.ndarray]]":
        """Rendered inputs for parity, {input: (H, W, 3) uint8}, always the same ones."""

    @abstractmethod
    def evaluate(self, predicted: "np.ndarray", true: "np.ndarray", reference: "np.ndarray") -> Any:
        """Metrics of (n, targets) predictions; NaN marks a missing label."""

    @abstractmethod
    def draw(
        self, images: "dict[str, np.ndarray]", outputs: dict[str, float], caption: str
    ) -> "Image":
        """Draw the outputs on the pictures that they were measured on."""

    def target(self, name: str) -> TargetSpec:
        """Return the target of a name."""
        return next(t for t in self.targets if t.name == name)
