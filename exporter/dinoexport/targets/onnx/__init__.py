"""ONNX, run by onnxruntime (Android, iOS, browser, server)."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import final

from dinoexport.graph.capture import CapturedProgram
from dinoexport.recipes import Activations
from dinoexport.targets.base import LowerOptions, Runtime, Target

_INTEGER = (Activations.INT8, Activations.INT8_DYNAMIC)


@final
class OnnxTarget(Target):
    """Opset 20; fp16 computes in half precision except the decoder; what is quantised computes in
    float32 around its integer products.
    """

    name = "onnx"
    suffix = ".onnx"
    layouts = frozenset({"tokens", "ane", "cpu"})
    supports = {  # noqa: RUF012
        "fp32": "everywhere",
        "fp16": "everywhere; faster on GPUs and NPUs, not on CPUs",
        "w8": "everywhere; a quarter of fp32's size at its speed: weights are unpacked on loading",
        "w8a8": "CPUs; 0.44 of fp32's time (ViT-S at 224, one thread, host), 0.56 at 518",
        "w8a8-dynamic": "CPUs; 0.43 of fp32's time (ViT-S at 224, one thread, host), 0.55 at 518",
        "w8a16": "everywhere, opset 21; no faster than fp32 on a CPU, no accelerator was tried",
        "w4-block32": "everywhere; a seventh of fp32's size at its speed: weights are unpacked on "
        "loading",
        "pal8": "everywhere; as w8, with smaller errors",
        "pal4": "everywhere; as w4-block32, with larger errors",
    }

    def lower(
        self,
        program: CapturedProgram,
        path: Path,
        options: LowerOptions,
        metadata: Mapping[str, str],
    ) -> dict[str, str]:
        """Write a checked .onnx file."""
        from dinoexport.targets.onnx.attention import LEAST_TOKENS, fuse_attention_
        from dinoexport.targets.onnx.constants import store_constants_in_half_
        from dinoexport.targets.onnx.integer import quantize_layers_
        from dinoexport.targets.onnx.lower import locate_taps, lower, save
        from dinoexport.targets.onnx.quantize import to_half_precision_

        model = lower(program)
        program.rest()
        integer = any(p.activations in _INTEGER for p in program.recipe.precisions)
        if program.recipe.name == "fp16":
            to_half_precision_(model, program.decode_nodes)
        elif program.recipe.name != "fp32":
            quantize_layers_(model, program.layers)
            store_constants_in_half_(model)
        if options.layout == "cpu":
            fuse_attention_(model, least_tokens=1)
        elif integer and options.layout == "tokens":
            # These recipes pay on CPUs alone, and onnxruntime's have this operator.
            fuse_attention_(model, LEAST_TOKENS)
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
