"""Run a Core ML package: by Core ML on a Mac, by the package evaluator elsewhere."""

import platform
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from dinoexport.errors import BundleError, ParityError
from dinoexport.targets.base import Cut, RunResult, Runtime, plain, whole
from dinoexport.targets.coreml.evaluator import PackageEvaluator


def open_runtime(path: Path, taps: Mapping[str, str], *, exact: bool) -> Runtime:
    """Core ML gives only outputs, as shipped; taps and exact arithmetic are the evaluator's."""
    if sys.platform == "darwin" and not taps and not exact:
        return CoremlRuntime(path)
    return EvaluatorRuntime(path, taps, exact=exact)


class EvaluatorRuntime(Runtime):
    """The package's own program and weights, operation by operation, without Apple's kernels."""

    def __init__(self, path: Path, taps: Mapping[str, str], *, exact: bool) -> None:
        self._evaluator = PackageEvaluator(path)
        self._taps = dict(taps)
        self._variables: dict[str, list[str]] = {}
        for tap, variable in taps.items():
            self._variables.setdefault(variable, []).append(tap)
        self._exact = exact
        rounding = "without activation rounding" if exact else "half precision as declared"
        self.name = f"package evaluator ({rounding}; Core ML itself was not run)"
        known = {name for op in self._evaluator.operations for name in op.outputs}
        missing = [name for name in taps.values() if name not in known]
        if missing:
            raise BundleError(
                f"{path}: variable {missing[0]}, named in the manifest as a tap, is not in the "
                "program. The package is not the one that was built; build it again."
            )

    def run(self, images: Mapping[str, np.ndarray], cut: Cut = whole) -> RunResult:
        """See Runtime.run.

        Raises:
            ParityError: a value passed the range of half precision (only without rounding, where
                its origin shows).
        """
        taps: dict[str, np.ndarray] = {}

        def take(variable: str, value: np.ndarray) -> None:
            for tap in self._variables[variable]:
                taps[tap] = cut(tap, np.array(value, np.float32))

        result = self._evaluator.run(
            dict(images),
            round_activations=not self._exact,
            keep=self._variables,
            take=take,
            watch=self._exact,
        )
        if result.overflowed:
            raise ParityError(
                f"half precision overflows at {result.overflowed[0]}. Build with --precision fp32."
            )
        taps = {tap: taps[tap] for tap in self._taps}
        return RunResult({n: plain(v) for n, v in result.outputs.items()}, taps)


class CoremlRuntime(Runtime):
    """Core ML on macOS."""

    def __init__(self, path: Path) -> None:
        import coremltools as ct

        self.name = f"Core ML on macOS {platform.mac_ver()[0]}"
        try:
            self._model = ct.models.MLModel(str(path))
        except Exception as error:  # Core ML's own errors arrive as several types
            reason = str(error).strip().splitlines()[0][:200]
            raise BundleError(f"{path}: Core ML cannot load it: {reason}") from error

    def run(self, images: Mapping[str, np.ndarray], cut: Cut = whole) -> RunResult:
        """See Runtime.run."""
        values = self._model.predict({n: Image.fromarray(i) for n, i in images.items()})
        return RunResult({n: plain(v) for n, v in values.items()}, {})
