"""Layers of a captured program → codes and integer products in the ONNX graph, as each layer's
precision has it.

Codes and scales are those of ``program.layers``; no weight is rounded here. Values keep their
names.
"""

from collections.abc import Mapping

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from dinoexport.errors import BuildError
from dinoexport.quantize.layers import Layer, Range
from dinoexport.quantize.weights import StoredWeight
from dinoexport.recipes import Activations
from dinoexport.targets.onnx.draft import Draft, replace_nodes_
from dinoexport.targets.onnx.weights import Place, unpack_weight

WIDE_OPSET = 21
"""The first one whose QuantizeLinear gives 16 bits."""


def quantize_layers_(model: ModelProto, layers: Mapping[str, Layer]) -> None:
    """Store the weights of quantised layers as codes, and multiply as their precision has it.

    Args:
        model: as lowered, float32 with the rounded weights; changed in place.
        layers: of the captured program, with their nodes, in running order.

    Raises:
        BuildError: a layer is not in the graph, or not with these weights.
    """
    writer = _Writer(model)
    for layer in layers.values():
        if layer.stored is not None:
            writer.write(layer, layer.stored)
    writer.finish_()


def grid_of(span: Range, activations: Activations) -> tuple[np.float32, np.integer]:
    """Return scale and zero point of the integers that a range is rounded to.

    8 bits are unsigned, because onnxruntime's products of uint8 and int8 are the fastest
    everywhere, and asymmetric, because what GELU gives is. 16 bits are symmetric.

    Args:
        span: lower and upper end.
        activations: by ranges of calibration.
    """
    if activations is Activations.INT16:
        return np.float32(max(-span[0], span[1]) / np.iinfo(np.int16).max), np.int16(0)
    low, high = min(span[0], 0.0), max(span[1], 0.0)
    scale = (high - low) / 255
    return np.float32(scale), np.uint8(np.clip(np.round(-low / scale), 0, 255))


class _Writer:
    """Collects what replaces the products of a graph."""

    def __init__(self, model: ModelProto) -> None:
        self._model = model
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._makers = {name: node for node in model.graph.node for name in node.output}
        self._weights = Draft()
        self._instead: dict[str, Draft] = {}
        self._packed: set[str] = set()
        self._inputs: dict[tuple[str, Activations, Range | None], tuple[str, ...]] = {}

    def write(self, layer: Layer, stored: StoredWeight) -> None:
        """Rewrite one layer, wherever its weight is read."""
        for node in self._products(layer):
            place = self._place(layer, stored, node)
            activations = layer.precision.activations
            if activations is not Activations.FLOAT and node.op_type != "MatMul":
                raise BuildError(
                    f"onnx: {layer.name} is a {node.op_type}, and only a MatMul can read "
                    "quantised activations. Please report the checkpoint's configuration."
                )
            if activations is Activations.INT8_DYNAMIC:
                self._multiply_dynamic(node, place, stored)
                continue
            if activations is Activations.FLOAT:
                self._unpack(place, stored)
                continue
            if layer.input_range is None:
                raise BuildError(f"onnx: {layer.name} has no range of its input. Calibrate again.")
            if activations is Activations.INT16:
                self._unpack(place, stored)
            else:
                self._dequantize(place, stored)
                self._widen_bias(node)
            self._round_input(node, layer.input_range, activations)

    def finish_(self) -> None:
        """Put everything in place."""
        nodes = list(self._weights.nodes)
        constants = list(self._weights.constants)
        for node in self._model.graph.node:
            draft = self._instead.get(node.output[0])
            nodes += [node] if draft is None else draft.nodes
            constants += [] if draft is None else draft.constants
        kept = [t for t in self._model.graph.initializer if t.name not in self._packed]
        del self._model.graph.initializer[:]
        self._model.graph.initializer.extend([*kept, *constants])
        if any(activations is Activations.INT16 for _, activations, _ in self._inputs):
            self._model.opset_import[0].version = WIDE_OPSET
        replace_nodes_(self._model, nodes)

    # --- where a layer is ------------------------------------------------------------------------

    def _products(self, layer: Layer) -> list[NodeProto]:
        """Return the nodes that multiply by a layer's weight: one for each of its runs."""
        node = self._makers.get(layer.node)
        if node is not None and node.op_type == "Add":
            made = [self._makers.get(name) for name in node.input]
            node = next((n for n in made if n is not None and n.op_type == "MatMul"), None)
        if node is None or node.op_type not in ("MatMul", "Gemm", "Conv"):
            raise BuildError(
                f"onnx: layer {layer.name} (node {layer.node}) is not in the exported graph. "
                "Please report the checkpoint's configuration."
            )
        weight = self._tensors[node.input[1]]
        same = [node]
        for other in self._model.graph.node:
            if other is node or other.op_type != node.op_type:
                continue
            tensor = self._tensors.get(other.input[1])
            # A layer that runs again may read a copy that was folded for it.
            if tensor is weight or (
                tensor is not None
                and tensor.dims == weight.dims
                and tensor.raw_data == weight.raw_data
            ):
                same.append(other)
        return same

    def _place(self, layer: Layer, stored: StoredWeight, node: NodeProto) -> Place:
        transposed = node.op_type == "MatMul" or (
            node.op_type == "Gemm" and not any(a.name == "transB" and a.i for a in node.attribute)
        )
        tensor = self._tensors[node.input[1]]
        place = Place(tensor.name, tuple(tensor.dims), transposed)
        if not np.array_equal(numpy_helper.to_array(tensor), place.turn(stored.values())):
            raise BuildError(
                f"onnx: the exporter changed the weights of {layer.name}, so its codes do not fit. "
                "Please report the checkpoint's configuration."
            )
        return place

    # --- forms -----------------------------------------------------------------------------------

    def _unpack(self, place: Place, stored: StoredWeight) -> None:
        """Float weights out of codes."""
        if self._pack(place):
            unpack_weight(self._weights, place, stored)

    def _dequantize(self, place: Place, stored: StoredWeight) -> None:
        """DequantizeLinear of codes: behind quantised activations a runtime knows what to do."""
        if self._pack(place):
            codes, scale = self._codes(self._weights, place, stored)
            axis = 1 if place.transposed else 0
            self._weights.node("DequantizeLinear", [codes, scale], place.name, axis=axis)

    def _multiply_dynamic(self, node: NodeProto, place: Place, stored: StoredWeight) -> None:
        """x → DynamicQuantizeLinear → MatMulInteger → Cast → Mul by both scales.

        onnxruntime makes one operator of all that and of the bias behind it.
        """
        draft, output = Draft(), node.output[0]
        key = (node.input[0], Activations.INT8_DYNAMIC, None)
        if key not in self._inputs:
            name = node.input[0]
            names = (f"{name}_quantized", f"{name}_step", f"{name}_zero")
            draft.node("DynamicQuantizeLinear", [name], names)
            self._inputs[key] = names
        quantized, step, zero = self._inputs[key]
        if self._pack(place):
            self._codes(self._weights, place, stored)
        product = draft.node(
            "MatMulInteger", [quantized, f"{place.name}_codes", zero], f"{output}_sum"
        )
        number = draft.cast(product, TensorProto.FLOAT, f"{output}_number")
        scale = draft.node("Mul", [step, f"{place.name}_scale"], f"{output}_scale")
        draft.node("Mul", [number, scale], output)
        self._instead[output] = draft

    def _round_input(self, node: NodeProto, span: Range, activations: Activations) -> None:
        """x → QuantizeLinear → DequantizeLinear → the product."""
        draft, source = Draft(), node.input[0]
        key = (source, activations, span)
        if key not in self._inputs:
            # Named after the first product: a mixture may round one value in several ways.
            name = node.output[0]
            step, zero = grid_of(span, activations)
            grid = [draft.constant(f"{name}_step", step), draft.constant(f"{name}_zero", zero)]
            codes = draft.node("QuantizeLinear", [source, *grid], f"{name}_quantized")
            self._inputs[key] = (draft.node("DequantizeLinear", [codes, *grid], f"{name}_rounded"),)
        product = NodeProto()
        product.CopyFrom(node)
        product.input[0] = self._inputs[key][0]
        draft.nodes.append(product)
        self._instead[node.output[0]] = draft

    def _widen_bias(self, node: NodeProto) -> None:
        """Give a bias three axes: with one, onnxruntime makes a Gemm of product and bias, for
        which it has no integer form without rounding the bias too (3 times slower).
        """
        for other in self._model.graph.node:
            if other.op_type == "Add" and node.output[0] in other.input:
                for name in other.input:
                    tensor = self._tensors.get(name)
                    if tensor is not None and len(tensor.dims) == 1:
                        tensor.dims[:] = [1, 1, *tensor.dims]

    def _pack(self, place: Place) -> bool:
        """Note that a weight is replaced; False if it was before."""
        first = place.name not in self._packed
        self._packed.add(place.name)
        return first

    @staticmethod
    def _codes(draft: Draft, place: Place, stored: StoredWeight) -> tuple[str, str]:
        """Add codes and one scale per output channel."""
        codes = place.turn(stored.codes.reshape(stored.shape))
        return (
            draft.constant(f"{place.name}_codes", codes),
            draft.constant(f"{place.name}_scale", stored.scale[:, 0]),
        )
