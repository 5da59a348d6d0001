"""ONNX, run by onnxruntime (Android, iOS, browser, server)."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import final

from dinoexport.graph.capture import CapturedProgram
from dinoexport.targets.base import LowerOptions, Runtime, Target


@final
class OnnxTarget(Target):
    """Opset 20; fp16 computes in half precision except the decoder."""

    name = "onnx"
    suffix = ".onnx"
    supports = {  # noqa: RUF012
        "fp32": "everywhere",
        "fp16": "everywhere; faster on GPUs and NPUs, not on CPUs",
    }

    def lower(
        self,
        program: CapturedProgram,
        path: Path,
        options: LowerOptions,
        metadata: Mapping[str, str],
    ) -> dict[str, str]:
        """Write a checked .onnx file."""
        from dinoexport.targets.onnx.lower import locate_taps, lower, save
        from dinoexport.targets.onnx.quantize import to_half_precision_

        model = lower(program)
        if program.recipe.name == "fp16":
            to_half_precision_(model, program.decode_nodes)
        save(model, path, metadata)
        return locate_taps(model, program.tap_nodes)

    def runtime(
        self, path: Path, taps: Mapping[str, str] | None = None, *, exact: bool = False
    ) -> Runtime:
        """Open the file in onnxruntime on the CPU."""
        from dinoexport.targets.onnx.runtime import OnnxRuntime

        return OnnxRuntime(path, taps or {}, exact=exact)

    def read_metadata(self, path: Path) -> dict[str, str]:
        """Return ``metadata_props``."""
        from dinoexport.targets.onnx.runtime import load

        return {p.key: p.value for p in load(path).metadata_props}

    def gelu_forms(self, path: Path) -> set[str]:
        """Read the ``approximate`` attribute of each Gelu."""
        from dinoexport.targets.onnx.runtime import gelu_forms, load

        return gelu_forms(load(path))

    def norm_epsilons(self, path: Path) -> list[float]:
        """Read the ``epsilon`` attribute of each normalisation."""
        from dinoexport.targets.onnx.runtime import load, norm_epsilons

        return norm_epsilons(load(path))

    def count_operations(self, path: Path) -> dict[str, int]:
        """Count node types."""
        from dinoexport.targets.onnx.runtime import load

        return dict(Counter(node.op_type for node in load(path).graph.node).most_common())
