"""The last pass of a conversion: weights become the codes, scales and tables of the recipe.

Core ML unpacks what a ``constexpr`` operation holds when it loads the model or while it runs.
Before:

    weight = const(float16)               → linear(x, weight, bias)

After, at w8a8:

    weight = constexpr_affine_dequantize(int8 codes, half-precision scales)
    x → quantize → dequantize             → linear(x, weight, bias)
"""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from coremltools.converters.mil.mil import Builder, types
from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
from coremltools.converters.mil.mil.passes.pass_registry import register_pass
from coremltools.converters.mil.mil.scope import ScopeInfo, ScopeSource
from numpy.typing import NDArray

from dinoexport.errors import BuildError
from dinoexport.graph.capture import CapturedProgram
from dinoexport.quantize.layers import Layer, Range
from dinoexport.quantize.weights import StoredWeight
from dinoexport.recipes import PALETTE_GROUP, Activations, WeightKind

PASS = "dinoexport::compress_weights"

mb: Any = Builder
"""Its methods, one per operation, exist only at run time."""


PIXEL_STEP = 256
"""What pixels are divided by where a scale would be below the normal numbers of half precision.

A layer that reads 0 to 255 has mean and std folded into its weights, and scales of 1e-5; hardware
that takes such numbers for zero would lose the whole layer. By a power of two nothing is rounded.
"""

_WEIGHTED = ("linear", "conv")


def layers_by_constant(program: CapturedProgram) -> dict[str, Layer]:
    """Return {name of the constant that holds a layer's weights: layer}.

    The converter names constants as the captured program names its parameters. Names of nodes it
    may change: the first ``linear`` becomes ``linear_0``.
    """
    layers = {layer.weight: layer for layer in program.layers.values()}
    parameters = program.program.graph_signature.inputs_to_parameters
    return {name: layers[key] for name, key in parameters.items() if key in layers}


def layer_of(operation: Any, layers: Mapping[str, Layer]) -> Layer | None:
    """Return the layer whose weights a MIL operation multiplies with, before or after casts."""
    if operation.op_type not in _WEIGHTED:
        return None
    return layers.get(operation.weight.name.removesuffix("_to_fp16"))


@register_pass(namespace="dinoexport")
class compress_weights(AbstractGraphPass):  # noqa: N801 (coremltools names passes so)
    """Store the weights of quantised layers as the recipe has them, and quantise their inputs.

    It runs last: constants have their final type then, and no pass folds or merges them any more.

    Options:
        layers: by the constants of their weights, see ``layers_by_constant``.
        ios: version that is built for.

    Raises:
        BuildError: a layer is not found, or the converter has changed its weights.
    """

    layers: Mapping[str, Layer] = {}
    ios: int = 17

    def apply(self, prog: Any) -> None:
        """Change the program in place."""
        done: dict[int, Any] = {}
        inputs: dict[tuple[int, Range], Any] = {}
        found: list[StoredWeight] = []
        for operation in list(prog.functions["main"].operations):
            layer = layer_of(operation, self.layers)
            if layer is None or layer.stored is None:
                continue
            found.append(layer.stored)
            factor = _pixel_factor(operation, layer.stored)
            changed = {"weight": self._packed(operation, layer, factor, done)}
            if factor != 1:
                changed["x"] = _divided_input(operation, factor)
            if layer.precision.activations is Activations.INT8:
                changed["x"] = _quantized_input(operation, layer, inputs)
            operation.set_inputs(**changed)
        for layer in self.layers.values():
            if layer.stored is not None and not any(_equal(layer.stored, s) for s in found):
                raise BuildError(
                    f"coreml: the converter fused or moved layer {layer.name}, so its quantised "
                    f"weights have no place. Leave it out: {layer.name}=fp16."
                )

    def _packed(self, operation: Any, layer: Layer, factor: int, done: dict[int, Any]) -> Any:
        """Return the variable of the packed weights; those of a layer are packed once."""
        weight, stored = operation.weight, layer.stored
        if id(weight) in done:
            return done[id(weight)]
        if stored is None or not _holds(weight, stored):
            raise BuildError(
                f"coreml: the converter changed the weights of layer {layer.name}, so its "
                f"quantised weights do not fit. Leave it out: {layer.name}=fp16."
            )
        if stored.precision.kind is WeightKind.INT:
            stored = dataclasses.replace(stored, scale=stored.scale * factor)
        pack = _pack_integers if stored.precision.kind is WeightKind.INT else _pack_palette
        with _beside(operation):
            done[id(weight)] = pack(weight, stored, operation, self.ios)
        return done[id(weight)]


@contextmanager
def _beside(operation: Any) -> Iterator[None]:
    """Build operations in the block of another one, as parts of the same piece of source code."""
    scopes = [
        ScopeInfo(source=source, data=data)
        for source, data in operation.scopes.items()
        if source is not ScopeSource.COREMLTOOLS_GRAPH_PASS
    ]
    with operation.enclosing_block, mb.scope(*scopes):
        yield


def _pixel_factor(operation: Any, stored: StoredWeight) -> int:
    """Return what the scales of a layer are multiplied with and its input is divided by."""
    if operation.weight.dtype is not types.fp16 or not stored.scale.size:
        return 1
    tiny = float(stored.scale.min()) < np.finfo(np.float16).smallest_normal
    return PIXEL_STEP if tiny and _reads_pixels(operation.x) else 1


def _reads_pixels(var: Any) -> bool:
    if var.op is None:
        return True
    if var.op.op_type == "cast":
        return _reads_pixels(var.op.x)
    return var.op.op_type == "concat" and all(map(_reads_pixels, var.op.values))


def _divided_input(operation: Any, factor: int) -> Any:
    x = operation.x
    step = np.asarray(1 / factor, np.float16 if x.dtype is types.fp16 else np.float32)
    with _beside(operation):
        return mb.mul(x=x, y=step, before_op=operation, name=f"{x.name}_divided")


def _equal(one: StoredWeight, other: StoredWeight) -> bool:
    """The converter merges constants of equal values."""
    return one is other or (
        one.shape == other.shape and bool(np.array_equal(one.values(), other.values()))
    )


def _holds(weight: Any, stored: StoredWeight) -> bool:
    if weight.val is None or tuple(weight.shape) != stored.shape:
        return False
    values = stored.values()
    return bool(np.array_equal(weight.val, values.astype(weight.val.dtype)))


def _pack_integers(weight: Any, stored: StoredWeight, before: Any, ios: int) -> Any:
    scale = stored.scale.astype(weight.val.dtype)
    codes = stored.codes.reshape(stored.shape)
    name = f"{weight.name}_quantized"
    if stored.precision.bits == 8 and ios < 18:
        return mb.constexpr_affine_dequantize(
            quantized_data=codes,
            zero_point=np.zeros(len(codes), np.int8),
            scale=scale[:, 0],
            axis=np.int32(0),
            before_op=before,
            name=name,
        )
    if stored.precision.bits == 4:
        codes = codes.astype(types.nptype_from_builtin(types.int4))
    sides = (len(codes), scale.shape[1], *(1 for _ in stored.shape[2:]))
    return mb.constexpr_blockwise_shift_scale(
        data=codes, scale=scale.reshape(sides), before_op=before, name=name
    )


def _pack_palette(weight: Any, stored: StoredWeight, before: Any, ios: int) -> Any:
    """Core ML has groups of one size: where the last group is smaller, tables are repeated."""
    channels, bits = len(stored.codes), stored.precision.bits
    group = int(np.gcd(PALETTE_GROUP, channels)) if channels > PALETTE_GROUP else channels
    tables = stored.table[np.arange(0, channels, group) // PALETTE_GROUP]
    tables = tables.astype(weight.val.dtype)
    if tables.nbytes + stored.codes.size * bits // 8 >= weight.val.nbytes:
        # The same numbers, and smaller.
        return weight
    ones = (1 for _ in stored.shape[1:])
    small: Any = types.nptype_from_builtin(types.string_to_builtin(f"uint{bits}"))
    return mb.constexpr_lut_to_dense(
        indices=stored.codes.reshape(stored.shape).astype(small),
        lut=tables.reshape(len(tables), *ones, -1, 1),
        before_op=before,
        name=f"{weight.name}_palettized",
    )


def activation_scale(reach: Range, dtype: type) -> NDArray[np.floating]:
    """Return the step of symmetric int8 that covers a range, as a number of the given type."""
    largest = max(abs(reach[0]), abs(reach[1]))
    step = np.asarray(largest / 127, np.float32)
    return np.maximum(step, np.finfo(np.float16).tiny).astype(dtype)


def _quantized_input(operation: Any, layer: Layer, done: dict[tuple[int, Range], Any]) -> Any:
    x = operation.x
    if layer.input_range is None:
        raise BuildError(
            f"coreml: layer {layer.name} has no range for its input. Give pictures with "
            "--calibration."
        )
    key = (id(x), layer.input_range)
    if key not in done:
        scale = activation_scale(
            layer.input_range, np.float16 if x.dtype is types.fp16 else np.float32
        )
        with _beside(operation):
            codes = mb.quantize(
                input=x,
                scale=scale,
                output_dtype="int8",
                before_op=operation,
                name=f"{x.name}_int8",
            )
            done[key] = mb.dequantize(
                input=codes, scale=scale, before_op=operation, name=f"{x.name}_dequantized"
            )
    return done[key]
