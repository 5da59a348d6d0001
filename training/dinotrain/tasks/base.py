"""What a task is: its images, its outputs with units, its head, its data, and its parity.

Nothing outside this folder asks which task it has.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import nn

    from dinotrain.data.dataset import Dataset, Sample
    from dinotrain.data.images import Pixels
    from dinotrain.data.summary import Summary
    from dinotrain.heads.branch import HeadKind
    from dinotrain.heads.pool import Pool
    from dinotrain.intervals import Intervals
    from dinotrain.model import ModelConfig, TaskModel
    from dinotrain.objectives.base import Objective, Predictions
    from dinotrain.report.page import Section
    from dinotrain.train_config import TrainConfig

    Loaded = tuple[dict[str, Pixels], np.ndarray]
    """Pictures of one sample, {input: (H, W, 3) uint8}, and its row of ``truth``."""


class TaskInput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One image that the model reads; ``optional`` ones may be missing in training data."""

    name: str
    description: str
    optional: bool = False


class OutputSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One named value with its unit; the same name, order and shape in every target."""

    name: str
    unit: str
    shape: tuple[int, ...]
    dtype: str
    description: str


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

    @property
    def interval_names(self) -> tuple[str, str]:
        """Names of the lower and the upper end of the value's interval, with its unit."""
        return f"{self.name}_low_{self.unit}", f"{self.name}_high_{self.unit}"


class Budgets(NamedTuple):
    """The largest error that parity accepts, by how numbers are held; in ``Task.error_unit``."""

    deploy: float
    """Of the graph that is exported against the trained model, both float32 in PyTorch."""
    float32: float
    float16: float
    weights8: float
    """Activations are float, or have 16 bits."""
    dynamic8: float
    """8-bit activations too, in the range of each picture."""
    static8: float
    """8-bit activations too, in ranges of calibration."""
    weights6: float
    weights4: float


class Case(NamedTuple):
    """Predictions of some samples beside the truth, as a report asks a task about them."""

    config: "ModelConfig"
    predicted: "Predictions"
    true: "np.ndarray"
    """What ``Task.truth`` gives."""
    names: list[str]
    load: "Callable[[int], dict[str, Pixels]]"
    """Number of a sample → its pictures, {input: (H, W, 3) uint8}."""
    metrics: Any
    """What ``Task.evaluate`` gives."""


class Branch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Targets that read the same vector, which is ``inputs_read`` pooled features wide."""

    name: str
    targets: tuple[str, ...]
    inputs_read: int


class Task(ABC):
    """One problem to solve on pictures. Subclasses are final."""

    name: str
    summary: str
    inputs: tuple[TaskInput, ...]
    labels: tuple[str, ...]
    """Names of the values that a sample is labelled with, where these are the same in all data."""
    heads: "tuple[HeadKind, ...]"
    """Kinds of heads that fit; the first is the default."""
    truth_moves: bool = False
    """Whether ``truth`` changes with the picture's geometry, as masks do."""
    window_mm: float = 0.0
    """Width of the picture that a model reads; 0 where pictures have no scale."""
    orientation: str = ""
    """The side that all pictures are mirrored to; nothing where none is."""
    notice: str = ""
    """What users of every model of this task must be told."""
    budgets: Budgets
    error_unit: str
    drop_option: str
    """Option of ``build --precision auto`` that bounds ``drop``, such as ``max-error-mm``."""
    drop_unit: str
    """Unit of ``drop``."""
    presets: "Mapping[str, Mapping[str, Any]]" = {}  # noqa: RUF012
    """Recipes by name, {name: {field of ``TrainConfig``: value}}."""

    def label_names(self, classes: "Sequence[str]") -> tuple[str, ...]:
        """Return the names of the values that a sample is labelled with.

        Args:
            classes: of the data or of the model.
        """
        return self.labels

    @abstractmethod
    def outputs(self, config: "ModelConfig") -> tuple[OutputSpec, ...]:
        """What a model of this task gives, in order."""

    @abstractmethod
    def preprocessing(self, image_size: tuple[int, int], window_mm: float) -> str:
        """What an app does to a picture before the model reads it."""

    @abstractmethod
    def build_head(self, config: "ModelConfig", pool: "Pool") -> "nn.Module":
        """Return the trained part over what a pool gives, {input: pooled}; it gives logits."""

    @abstractmethod
    def build_decoder(self, config: "ModelConfig") -> "nn.Module":
        """Return what turns logits into {output: values}; the last part of the deploy graph."""

    @abstractmethod
    def choose_loss(self, config: "TrainConfig") -> str:
        """Return the loss that is named, or the task's own where none is.

        Raises:
            UsageError: the named loss does not fit.
        """

    @abstractmethod
    def objective(self, config: "TrainConfig", model: "TaskModel") -> "Objective":
        """Return what training minimises, and how predictions are judged."""

    def truth(self, samples: "Sequence[Sample]", image_size: tuple[int, int]) -> "np.ndarray":
        """Return what predictions are compared with: (n, labels) float64, NaN where missing."""
        from dinotrain.data.dataset import label_table

        return label_table(samples, self.labels)

    @abstractmethod
    def read(
        self,
        path: Path,
        *,
        image_size: tuple[int, int],
        seed: int = 0,
        skip_unreadable: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> "Dataset":
        """Read labelled data, checked, split by subject.

        Args:
            path: what the task reads.
            image_size: (height, width) of what ``Dataset.load`` gives.
            seed: of the split, where the data leave it open.
            skip_unreadable: leave out pictures that cannot be read, and say so in
                ``Dataset.skipped``; a sample goes with a picture that it cannot be without.
            progress: called with (pictures judged, of how many) after each.

        Raises:
            DataError: the data cannot be used; every picture that cannot be read is named.
        """

    def summarise(self, dataset: "Dataset") -> "Summary":
        """Return what is in some data: splits, classes or ranges of labels, and notes."""
        from dinotrain.data.summary import summarise

        return summarise(dataset, self.labels, self.expected)

    def load(
        self,
        sample: "Sample",
        image_size: tuple[int, int],
        stream: "np.random.Generator | None" = None,
    ) -> "Loaded":
        """Read one sample: {input: (H, W, 3) uint8}, and its row of ``truth``.

        Args:
            sample: what to read.
            image_size: (height, width) in pixels.
            stream: of the augmentation; None leaves the pictures as they are.
        """
        from dinotrain.data.dataset import load_image

        pixels = {name: load_image(ref, image_size) for name, ref in sample.images.items()}
        truth = self.truth([sample], image_size)[0]
        return (pixels, truth) if stream is None else self.augment(pixels, truth, stream)

    @abstractmethod
    def augment(
        self, pixels: "dict[str, Pixels]", truth: "np.ndarray", stream: "np.random.Generator"
    ) -> "Loaded":
        """Change a training sample at random, in ways that its labels bear."""

    def error(self, expected: "np.ndarray", actual: "np.ndarray") -> float:
        """Return how far one output is off, in ``error_unit``: the largest difference.

        Both are float64, finite and of one shape, the samples first.
        """
        return float(abs(actual - expected).max())

    @abstractmethod
    def drop(
        self,
        expected: "Predictions",
        actual: "Predictions",
        true: "np.ndarray | None" = None,
    ) -> float:
        """Return what users lose by a smaller artifact, in ``drop_unit``; never below zero.

        Args:
            expected: named outputs of the model in float32, samples first.
            actual: of the artifact.
            true: what ``truth`` gives for these samples, where they are labelled; without it the
                float32 outputs are taken for the truth.
        """

    @abstractmethod
    def synthesise(
        self, count: int, seed: int, out: Path, progress: Callable[[int, int], None] | None = None
    ) -> Path:
        """Write a synthetic data set that ``read`` reads; returns its manifest."""

    @abstractmethod
    def render_samples(
        self, count: int, image_size: tuple[int, int], seed: int | None = None
    ) -> "list[dict[str, np.ndarray]]":
        """Rendered inputs, {input: (H, W, 3) uint8}; the same arguments give the same pixels.

        Args:
            count: of samples.
            image_size: (height, width) in pixels.
            seed: of the renderer; None is that of the samples that parity runs on.
        """

    @abstractmethod
    def expected(self, values: dict[str, float]) -> dict[str, float]:
        """Return the outputs of one number that labels {label: value} stand for."""

    @abstractmethod
    def evaluate(
        self,
        predicted: "Predictions",
        true: "np.ndarray",
        reference: "np.ndarray",
        classes: tuple[str, ...] = (),
        subjects: Sequence[Hashable] = (),
    ) -> Any:
        """Metrics per output of predictions; NaN marks a missing label.

        Args:
            predicted: the named outputs, samples first.
            true: what ``truth`` gives for them.
            reference: (m, labels), labels that were trained on: what a model must beat.
            classes: names, where the task has classes.
            subjects: (n,), who each row is of; nothing leaves out what is counted by subject.
        """

    def calibrate(
        self,
        predicted: "Mapping[str, NDArray[np.floating]]",
        true: "NDArray[np.floating]",
        subjects: Sequence[Hashable],
        coverage: float,
    ) -> "tuple[Intervals | None, str]":
        """Make intervals from predictions on subjects that no weight was trained on.

        Args:
            predicted: {output name: (n, …)} without intervals, by the weights as stored.
            true: (n, labels), NaN where there is no label.
            subjects: (n,), who each row is of.
            coverage: how often an interval is to hold for a new subject, between 0 and 1.

        Returns:
            The intervals and nothing, or None and why there are none; no reason where the task has
            no intervals at all.
        """
        return None, ""

    @abstractmethod
    def section(self, case: Case) -> "Section":
        """Return the part of a report about some predictions."""

    @abstractmethod
    def draw(
        self,
        images: "dict[str, np.ndarray]",
        outputs: dict[str, Any],
        caption: str,
        classes: tuple[str, ...] = (),
    ) -> "Image":
        """Draw the outputs (arrays or plain numbers) on the pictures that they come from."""
