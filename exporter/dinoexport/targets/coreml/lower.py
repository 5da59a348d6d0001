"""Captured program → Core ML package by coremltools' torch.export route."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np

from dinoexport.errors import BuildError
from dinoexport.graph.capture import CapturedProgram
from dinoexport.quantize.layers import Layer
from dinoexport.targets.base import LowerOptions
from dinoexport.targets.coreml.compression import PASS, layer_of, layers_by_constant
from dinoexport.targets.coreml.evaluator import PackageEvaluator
from dinoexport.targets.coreml.package import normalise_package
from dinoexport.targets.coreml.precision import half_before
from dinoexport.targets.coreml.systems import needed_ios

_UNWANTED_PASSES = ("common::fuse_elementwise_to_batchnorm",)
"""It writes γx + β as a batch_norm of mean 0, variance 1 and ε 1e-5, which divides by √1.00001:
behind each GroupNorm that left 106 dB."""

_TARGETS = {
    16: ct.target.iOS16,
    17: ct.target.iOS17,
    18: ct.target.iOS18,
}


def lower(
    program: CapturedProgram, path: Path, options: LowerOptions, metadata: Mapping[str, str]
) -> None:
    """Convert and save, with the same bytes for the same program.

    Raises:
        BuildError: an unknown minimum iOS, or an operation that Core ML cannot express.
    """
    if options.minimum_ios not in _TARGETS:
        raise BuildError(
            f"coreml: minimum iOS {options.minimum_ios} is not supported; "
            f"accepted: {', '.join(map(str, _TARGETS))}"
        )
    ios = needed_ios(program.recipe, options)
    layers = layers_by_constant(program)
    height, width = program.image_size
    passes: Any = ct.PassPipeline.DEFAULT
    passes.remove_passes(_UNWANTED_PASSES)
    passes.append_pass(PASS)
    passes.set_options(PASS, {"layers": layers, "ios": ios})
    try:
        model: Any = ct.convert(
            program.program,
            inputs=[
                ct.ImageType(
                    name=name, shape=(1, 3, height, width), color_layout=ct.colorlayout.RGB
                )
                for name in program.input_names
            ],
            outputs=[
                ct.TensorType(name=name, dtype=dtype)
                for name, dtype in zip(program.output_names, _output_dtypes(program), strict=True)
            ],
            minimum_deployment_target=_TARGETS[ios],
            compute_precision=_compute_precision(program, layers),
            pass_pipeline=passes,
            compute_units=ct.ComputeUnit.ALL,
            skip_model_load=True,
        )
    except (ValueError, RuntimeError, NotImplementedError, TypeError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
        raise BuildError(f"coreml: the converter failed: {reason}") from error
    model.author = "dinoexport"
    model.license = metadata.get("licence", "")
    model.short_description = metadata.get("summary", "")
    for name, text in _texts(metadata, "input.").items():
        model.input_description[name] = text
    for name, text in _texts(metadata, "output.").items():
        model.output_description[name] = text
    for key, value in sorted(metadata.items()):
        model.user_defined_metadata[key] = value
    model.save(str(path))
    normalise_package(path)


def _compute_precision(program: CapturedProgram, layers: Mapping[str, Layer]) -> Any:
    """Half precision, but in float32 layers and where values are decoded; or the other way."""
    names = [precision.name for precision in program.recipe.precisions]
    single = names[0] == "fp32"
    if single and "fp16" not in names:
        return ct.precision.FLOAT32
    before_decoding = half_before(program.decode_nodes)

    def may_be_half(operation: Any) -> bool:
        layer = layer_of(operation, layers)
        if single:
            return layer is not None and layer.precision.name == "fp16"
        return before_decoding(operation) and (layer is None or layer.precision.name != "fp32")

    return ct.transform.FP16ComputePrecision(op_selector=may_be_half)


def _output_dtypes(program: CapturedProgram) -> list[type]:
    """float32 or int32 per output, as the program has it; unasked, an fp16 build gives half."""
    values = {node.name: node.meta.get("val") for node in program.program.graph.nodes}
    outputs = [spec.arg.name for spec in program.program.graph_signature.output_specs]
    return [np.float32 if values[o].is_floating_point() else np.int32 for o in outputs]


def _texts(metadata: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}


def locate_taps(path: Path, program: CapturedProgram) -> dict[str, str]:
    """Find each tap's variable in the saved package: the converter keeps node names."""
    evaluator = PackageEvaluator(path)
    shapes = {
        node.name: tuple(node.meta["val"].shape)
        for node in program.program.graph.nodes
        if node.name in program.tap_nodes.values()
    }
    return {tap: evaluator.locate(node, shapes[node]) for tap, node in program.tap_nodes.items()}
