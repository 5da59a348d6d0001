"""Core ML (iOS, iPadOS, macOS); on Linux its packages are evaluated operation by operation."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import final

from dinoexport.graph.capture import CapturedProgram
from dinoexport.recipes import Recipe
from dinoexport.targets.base import LowerOptions, Runtime, Target
from dinoexport.targets.coreml.systems import name_systems, needed_ios


@final
class CoremlTarget(Target):
    """ML program with RGB image inputs; fp16 computes in half precision except the decoder."""

    name = "coreml"
    suffix = ".mlpackage"
    timed_here = sys.platform == "darwin"
    # The evaluator computes one operation after the other, whichever values are kept.
    taps_disturb = timed_here
    image_input = True
    supports = {  # noqa: RUF012
        "fp32": "CPU and GPU; the Neural Engine computes in half precision only",
        "fp16": "everywhere; what the Neural Engine computes in",
        "w8": "everywhere; half the size of fp16, no faster",
        "w8a8": "iOS 17; faster from A17 Pro and M4 on (Neural Engine), elsewhere only smaller",
        "w4-block32": "iOS 18; made for the GPU of a Mac, no faster on the Neural Engine",
        "pal8": "iOS 18; half the size of fp16; the Neural Engine unpacks it while it runs",
        "pal6": "iOS 18; smaller yet; the Neural Engine unpacks it while it runs",
        "pal4": "iOS 18; a quarter of the size; the Neural Engine unpacks it while it runs",
    }

    def lower(
        self,
        program: CapturedProgram,
        path: Path,
        options: LowerOptions,
        metadata: Mapping[str, str],
    ) -> dict[str, str]:
        """Write a .mlpackage folder."""
        from dinoexport.targets.coreml.lower import locate_taps, lower

        lower(program, path, options, metadata)
        return locate_taps(path, program) if program.tap_nodes else {}

    def runtime(
        self, path: Path, taps: Mapping[str, str] | None = None, *, exact: bool = False
    ) -> Runtime:
        """Core ML itself on a Mac for the outputs; the package evaluator for all else."""
        from dinoexport.targets.coreml.runtime import open_runtime

        return open_runtime(path, taps or {}, exact=exact)

    def read_metadata(self, path: Path) -> dict[str, str]:
        """Return the user-defined metadata of the package."""
        from dinoexport.targets.coreml.package import open_package

        return dict(open_package(path).spec.description.metadata.userDefined)

    def gelu_forms(self, path: Path) -> set[str]:
        """Read the ``mode`` of each gelu."""
        from dinoexport.targets.coreml.evaluator import PackageEvaluator

        forms = {"EXACT": "exact", "TANH_APPROXIMATION": "tanh"}
        modes = {
            str(op.settings.get("mode", "EXACT"))
            for op in PackageEvaluator(path).operations
            if op.kind == "gelu"
        }
        return {forms.get(mode, mode.lower()) for mode in modes}

    def norm_epsilons(self, path: Path) -> list[float]:
        """Read the ``epsilon`` of each layer_norm, and what is added before each square root."""
        from dinoexport.targets.coreml.evaluator import PackageEvaluator, norm_epsilons

        return norm_epsilons(PackageEvaluator(path).operations)

    def count_operations(self, path: Path) -> dict[str, int]:
        """Count MIL operations, constants left out."""
        from dinoexport.targets.coreml.evaluator import PackageEvaluator

        return dict(PackageEvaluator(path).counts.most_common())

    def notice(self, recipe: Recipe, options: LowerOptions) -> str:
        """Tell which iOS the recipe raises the package to."""
        needed, asked = needed_ios(recipe, options), options.minimum_ios
        if needed == asked:
            return ""
        return f"{self.name}: {recipe.name} needs iOS {needed}; iOS {asked} cannot open the package"

    def minimum_os(self, recipe: Recipe, options: LowerOptions) -> str:
        """Return the iOS and macOS versions that the specification asks for."""
        return name_systems(needed_ios(recipe, options))
