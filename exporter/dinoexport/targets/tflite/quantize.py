"""The numbers of a recipe in a TFLite file: float32 weights become the codes that PyTorch computed
with, and linear layers whose activations are quantised become integer operators.

    w8            codes → DEQUANTIZE → FULLY_CONNECTED        (unpacked once, when a file is loaded)
    w8a8-dynamic  FULLY_CONNECTED of codes                    (its kernel quantises its input)
    w8a8, w8a16   QUANTIZE → FULLY_CONNECTED of codes → DEQUANTIZE
    w4-block32    as w8a8-dynamic; LiteRT has no other kernel for blocks, and none for convolutions,
                  whose numbers half precision holds
"""

import hashlib
from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinoexport.errors import BuildError
from dinoexport.graph.capture import CapturedProgram
from dinoexport.quantize.layers import Layer, Range
from dinoexport.quantize.weights import StoredWeight
from dinoexport.recipes import Activations
from dinoexport.targets.tflite.graph import (
    TORCH_ORDER,
    Graph,
    Kind,
    Type,
    per_block,
    per_channel,
    per_tensor,
)

_LARGE = 4096
"""Numbers from which on a constant that is no weight is stored in half, such as positions."""

_CODES = {Activations.INT8: (Type.INT8, 127), Activations.INT16: (Type.INT16, 32767)}


def store_layers_(graph: Graph, program: CapturedProgram) -> None:
    """Make a graph hold the weights of its layers as the recipe stores them, in place.

    Float weights, and large constants, that half precision holds exactly are stored in it.

    Raises:
        BuildError: the converter changed a layer's weights, so that its codes do not fit them; or
            layers of equal weights are to ship differently and cannot be told apart.
    """
    layers = _match(graph, program)
    writer = _Writer(graph)
    for index, operator in enumerate(graph.operators):
        layer = layers.get(index)
        blocks = layer is not None and layer.stored is not None and layer.stored.precision.block
        in_half = blocks and graph.kind(operator) != Kind.FULLY_CONNECTED
        if layer is None or layer.stored is None or in_half:
            writer.write(operator)
        else:
            writer.write_layer(operator, layer, layer.stored)
    graph.operators = writer.operators


def _match(graph: Graph, program: CapturedProgram) -> dict[int, Layer]:
    """Return the layer of each operator, by its place; layers are known by their weights.

    A layer may run several times, and the converter keeps equal weights once: where layers of equal
    weights ship differently, their order in the graph tells which is which.
    """
    runs: dict[bytes, list[Layer]] = defaultdict(list)
    for layer in _runs(program):
        weight = program.program.state_dict[layer.weight].numpy()
        runs[_digest(weight)].append(layer)
    places: dict[bytes, list[int]] = defaultdict(list)
    for index, operator in enumerate(graph.operators):
        order = TORCH_ORDER.get(graph.kind(operator))
        weight = None if order is None else graph.constant(operator.inputs[1])
        if order is not None and weight is not None:
            places[_digest(weight.transpose(order))].append(index)
    found: dict[int, Layer] = {}
    for key, layers in runs.items():
        at = places[key]
        same = all(_ships_alike(layers[0], layer) for layer in layers)
        if not at and layers[0].stored is not None:
            raise BuildError(
                f"tflite: the converter changed the weights of {layers[0].name}, so its codes do "
                f"not fit. Add :{layers[0].name}=fp16 to --precision."
            )
        if not same and len(at) != len(layers):
            names = ", ".join(dict.fromkeys(layer.name for layer in layers))
            raise BuildError(
                f"tflite: {names} hold equal weights and cannot be told apart. "
                "Give them one precision."
            )
        found |= dict.fromkeys(at, layers[0]) if same else dict(zip(at, layers, strict=True))
    return found


def _runs(program: CapturedProgram) -> list[Layer]:
    """Return the layer of each node that reads a layer's weights, in the graph's order."""
    parameters = program.program.graph_signature.inputs_to_parameters
    owners = {layer.weight: layer for layer in program.layers.values()}
    read = [
        parameters.get(source.name, "")
        for node in program.program.graph.nodes
        if node.op == "call_function"
        for source in node.all_input_nodes
    ]
    return [owners[weight] for weight in read if weight in owners]


def _ships_alike(one: Layer, other: Layer) -> bool:
    ranges = (one.input_range, one.output_range) == (other.input_range, other.output_range)
    return one.precision == other.precision and ranges


def _digest(weight: NDArray[np.float32]) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(weight).tobytes()).digest()


class _Writer:
    """Writes operators one after the other, with what each needs before and behind it."""

    def __init__(self, graph: Graph) -> None:
        self.operators: list[Any] = []
        self._graph = graph
        self._packed: dict[tuple[int, int], int] = {}
        self._unpacked: dict[int, int] = {}
        self._quantized: dict[tuple[int, int, float, int], int] = {}

    def write(self, operator: Any) -> None:
        """Write an operator without integers.

        Its float constants are stored in half where that keeps every number.
        """
        graph = self._graph
        for place, index in enumerate(operator.inputs):
            values = graph.constant(index)
            weight = place == 1 and graph.kind(operator) in TORCH_ORDER
            if values is None or not (weight or values.size >= _LARGE):
                continue
            half = values.astype(np.float16)
            if np.array_equal(half.astype(np.float32), values):
                key = (index, Type.FLOAT16)
                if key not in self._packed:
                    name, shape = graph.name(index), graph.shape(index)
                    self._packed[key] = graph.add_constant(name, shape, Type.FLOAT16, half)
                operator.inputs[place] = self._unpack(self._packed[key], version=3)
        self.operators.append(operator)

    def write_layer(self, operator: Any, layer: Layer, stored: StoredWeight) -> None:
        """Write the operator that computes a layer of integers."""
        if layer.precision.activations in _CODES:
            self._write_static(operator, layer, stored)
            return
        if stored.precision.block:
            operator.inputs[1] = self._blocks(operator.inputs[1], stored)
            self._graph.set_version(operator, 10)
            self.operators.append(operator)
            return
        weight = self._codes(operator, stored)
        if layer.precision.activations is Activations.INT8_DYNAMIC:
            self._graph.set_version(operator, 12)
            operator.builtinOptions.asymmetricQuantizeInputs = True
        else:
            weight = self._unpack(weight, version=5)
        operator.inputs[1] = weight
        self.operators.append(operator)

    def _codes(self, operator: Any, stored: StoredWeight) -> int:
        """Add the integers of a layer in the operator's own order of axes."""
        graph, source = self._graph, operator.inputs[1]
        key = (source, Type.INT8)
        if key not in self._packed:
            shape = graph.shape(source)
            order = TORCH_ORDER[graph.kind(operator)]
            codes = stored.codes.reshape([shape[axis] for axis in order])
            codes = codes.transpose(np.argsort(order))
            scale = per_channel(stored.scale[:, 0], axis=order[0])
            self._packed[key] = graph.add_constant(
                graph.name(source), shape, Type.INT8, codes, scale
            )
        return self._packed[key]

    def _blocks(self, source: int, stored: StoredWeight) -> int:
        """Add 4-bit integers, two to a byte, the first one in the lower half."""
        graph = self._graph
        key = (source, Type.INT4)
        if key not in self._packed:
            name, shape = graph.name(source), graph.shape(source)
            half = stored.scale.astype(np.float16)
            scales = graph.add_constant(f"{name}/scales", half.shape, Type.FLOAT16, half)
            codes = stored.codes.reshape(-1).view(np.uint8) & 15
            pairs = codes[0::2] | codes[1::2] << 4
            self._packed[key] = graph.add_constant(
                name, shape, Type.INT4, pairs, per_block(scales, stored.block)
            )
        return self._packed[key]

    def _unpack(self, index: int, version: int) -> int:
        """Give the float32 form of a constant."""
        if index not in self._unpacked:
            graph = self._graph
            name, shape = f"{graph.name(index)}/unpacked", graph.shape(index)
            self._unpacked[index] = graph.add_tensor(name, shape, Type.FLOAT32)
            self.operators.append(
                graph.operator(Kind.DEQUANTIZE, version, [index], [self._unpacked[index]])
            )
        return self._unpacked[index]

    def _write_static(self, operator: Any, layer: Layer, stored: StoredWeight) -> None:
        """Write a linear layer of integers in and out."""
        graph = self._graph
        kind, top = _CODES[layer.precision.activations]
        scale, zero = _affine(layer.input_range, top)
        source, _, *rest = operator.inputs
        inputs = [self._quantize(source, kind, scale, zero), self._codes(operator, stored)]
        if rest and rest[0] >= 0:
            step = np.float32(scale) * stored.scale[:, 0]
            inputs.append(self._bias(rest[0], layer.name, step, kind))
        (target,) = operator.outputs
        name, shape = f"{graph.name(target)}/codes", graph.shape(target)
        output = graph.add_tensor(name, shape, kind, per_tensor(*_affine(layer.output_range, top)))
        operator.inputs, operator.outputs = inputs, [output]
        self.operators.append(operator)
        self.operators.append(graph.operator(Kind.DEQUANTIZE, 3, [output], [target]))

    def _quantize(self, source: int, kind: int, scale: float, zero: int) -> int:
        """Give the integers of an activation; layers that read it alike share them."""
        key = (source, kind, scale, zero)
        if key not in self._quantized:
            graph = self._graph
            name = f"{graph.name(source)}/codes{len(self._quantized)}"
            index = graph.add_tensor(name, graph.shape(source), kind, per_tensor(scale, zero))
            self._quantized[key] = index
            self.operators.append(graph.operator(Kind.QUANTIZE, 2, [source], [index]))
        return self._quantized[key]

    def _bias(self, index: int, layer: str, step: NDArray[np.float32], kind: int) -> int:
        """Add a bias in steps of what the products of input and weight codes stand for.

        The float numbers stay beside it, as the range that each integer stands for, which no
        kernel reads: the exact form does.
        """
        graph = self._graph
        bias = graph.constant(index)
        if bias is None:
            raise BuildError(f"tflite: the bias of {layer} is no constant")
        codes = np.round(bias.astype(np.float64) / step)
        wide = np.int64 if kind == Type.INT16 else np.int32
        if not (np.abs(codes) <= np.iinfo(np.int32).max).all():
            raise BuildError(
                f"tflite: the bias of {layer} holds {np.abs(bias).max():.3g}, too much beside "
                f"its weights. Add :{layer}=w8 to --precision."
            )
        record = per_channel(step)
        record.min = bias
        record.max = bias
        stored = Type.INT64 if kind == Type.INT16 else Type.INT32
        return graph.add_constant(
            f"{graph.name(index)}/{layer}", bias.shape, stored, codes.astype(wide), record
        )


def _affine(ends: Range | None, top: int) -> tuple[float, int]:
    """Return scale and zero point of a range; those of 16 bits are symmetric, as kernels want."""
    if ends is None:
        raise BuildError("tflite: a layer of quantised activations came without its ranges")
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    if low == high:
        return 1.0, 0
    if top > 127:
        return float(np.float32(max(-low, high) / top)), 0
    scale = float(np.float32((high - low) / 255))
    return scale, int(np.clip(round(-128 - low / scale), -128, 127))
