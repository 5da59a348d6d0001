"""What a target is: it lowers the captured program, and runs what it wrote."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from dinoexport.graph.capture import CapturedProgram
from dinoexport.recipes import Recipe, nearest
from dinotrain.errors import UsageError


def plain(value: ArrayLike) -> np.ndarray:
    """Return what a runtime gave in one of two types: int32 for whole numbers, else float32."""
    array = np.asarray(value)
    return array.astype(np.int32 if array.dtype.kind in "iub" else np.float32, copy=False)


@dataclass(frozen=True)
class RunResult:
    """Outputs and taps of one run, by name: float32 arrays, int32 where outputs are numbers of
    classes.
    """

    outputs: dict[str, np.ndarray]
    taps: dict[str, np.ndarray]


Cut = Callable[[str, np.ndarray], np.ndarray]
"""(tap, its value as float32) → what is wanted of it."""


def whole(_tap: str, value: np.ndarray) -> np.ndarray:
    """All of a tap."""
    return value


class Runtime(ABC):
    """A loaded artifact."""

    name: str
    """What ran it, with its version, as reports print it."""

    @abstractmethod
    def run(self, images: Mapping[str, np.ndarray], cut: Cut = whole) -> RunResult:
        """{input: (H, W, 3) uint8 RGB} → outputs, and the taps if it was opened with them.

        Args:
            images: by input.
            cut: of each tap, as soon as may be: all taps of a large model are as much memory as its
                weights.
        """


@dataclass(frozen=True)
class LowerOptions:
    """What can be chosen besides the recipe; a target ignores what does not concern it."""

    minimum_ios: int = 17
    layout: str = "tokens"


class Target(ABC):
    """One artifact format. Subclasses are final."""

    name: str
    suffix: str
    supports: Mapping[str, str]
    """Precisions that can be built, {name: where it runs and where it pays}."""
    layouts: frozenset[str] = frozenset({"tokens", "ane"})
    """That it has a form for; see ``passes.sequence.LAYOUTS``."""
    timed_here: bool = True
    """True where this machine runs artifacts by the runtime that apps use."""
    taps_disturb: bool = True
    """True where taps may change what an artifact computes: as outputs they keep a runtime from
    fusing."""
    image_input: bool = False
    """True where the natural input is an image type rather than an NHWC tensor."""

    @abstractmethod
    def lower(
        self,
        program: CapturedProgram,
        path: Path,
        options: LowerOptions,
        metadata: Mapping[str, str],
    ) -> dict[str, str]:
        """Write the artifact of ``program.recipe``, with its metadata inside, and return where its
        taps are.

        Returns:
            {tap: name of the value inside the artifact}, of the program's taps.

        Raises:
            BuildError: the converter cannot express the program.
        """

    @abstractmethod
    def runtime(
        self, path: Path, taps: Mapping[str, str] | None = None, *, exact: bool = False
    ) -> Runtime:
        """Open an artifact.

        Args:
            path: the artifact.
            taps: values to read besides the outputs.
            exact: compute in float32 with the weights as they are stored, without rounding
                activations (the structural gate).
        """

    def exact_runtimes(
        self, path: Path, taps: Mapping[str, str]
    ) -> Sequence[Callable[[], Runtime]]:
        """Return ways to open an artifact in exact arithmetic, the fastest kernels first.

        What holds the structural gate in any of them holds it.
        """
        return (lambda: self.runtime(path, taps, exact=True),)

    @abstractmethod
    def read_metadata(self, path: Path) -> dict[str, str]:
        """Return the metadata embedded in the artifact."""

    @abstractmethod
    def count_operations(self, path: Path) -> dict[str, int]:
        """Return how often each operation occurs, most frequent first."""

    @abstractmethod
    def gelu_forms(self, path: Path) -> set[str]:
        """Return which forms of GELU the artifact computes: ``exact``, ``tanh``, ``sigmoid``.

        Where activations are small the forms differ by less than rounding, so taps cannot tell.
        """

    @abstractmethod
    def norm_epsilons(self, path: Path) -> list[float]:
        """Return the epsilon of each LayerNorm and GroupNorm, in running order.

        Where a layer's variance is large, taps cannot tell a wrong epsilon either.
        """

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe that this target cannot build.

        Raises:
            UsageError: with the nearest one that it can.
        """
        for precision in recipe.precisions:
            if precision.name not in self.supports:
                raise UsageError(
                    f"--precision {recipe.name}: {self.name} has no {precision.name}; the nearest "
                    f"it has is {nearest(precision, self.supports)}. "
                    f"It has {', '.join(self.supports)}; see `dinoexport list recipes`."
                )

    def check_weights(self, size_bytes: int) -> None:  # noqa: B027 (most formats hold any)
        """Refuse a model that the format cannot hold, before minutes are spent on it.

        Args:
            size_bytes: of its weights in float32, which is what converters read.

        Raises:
            BuildError: it is too large.
        """

    def notice(self, recipe: Recipe, options: LowerOptions) -> str:
        """Return what the user should know before an artifact is built, in one line, or nothing."""
        return ""

    def minimum_os(self, recipe: Recipe, options: LowerOptions) -> str:
        """Return the oldest system that runs the artifact, as the manifest says it."""
        return ""


def artifact_bytes(path: Path) -> int:
    """Size of an artifact: of its file or of those within its folder, and of weights beside it."""
    weights = path.with_name(f"{path.name}.data")
    return sum(p.stat().st_size for p in (path, weights, *path.rglob("*")) if p.is_file())
