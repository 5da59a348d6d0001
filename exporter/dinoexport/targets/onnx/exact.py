"""An ONNX graph → the same in float32, without any rounding of activations: what the structural
gate runs.

Each operator of integers gets its counterpart of real numbers, with the scales and zero points
that are stored. So a wrong one shows, and rounding alone does not.
"""

from collections.abc import Callable

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto

from dinoexport.targets.onnx.draft import Draft, replace_nodes_
from dinoexport.targets.onnx.quantize import retarget_casts_

_FLOAT, _DOUBLE = TensorProto.FLOAT, TensorProto.DOUBLE


def to_exact_precision_(model: ModelProto) -> None:
    """Compute in float32 with the weights as they are stored, in place; values keep their names."""
    draft = Draft()
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            # The runtime widens them while it loads: copies of large weights would not fit.
            name, tensor.name = tensor.name, f"{tensor.name}_stored_half"
            draft.cast(tensor.name, _FLOAT, name)
    for value in model.graph.value_info:
        # Of operators that shape inference does not know; it types all others anew.
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = _FLOAT
    stored = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in stored:
            _unpack(draft, node, stored)
        elif node.op_type in _COUNTERPARTS:
            _COUNTERPARTS[node.op_type](draft, node)
        else:
            retarget_casts_(node, TensorProto.FLOAT16, _FLOAT)
            draft.nodes.append(node)
    model.graph.initializer.extend(draft.constants)
    replace_nodes_(model, draft.nodes)


def _quantize(draft: Draft, node: NodeProto) -> None:
    """x/scale + zero point, in float64: float32 would lose small numbers beside the zero point."""
    _place_on_grid(draft, *node.input, output=node.output[0])


def _quantize_dynamic(draft: Draft, node: NodeProto) -> None:
    """The same with the scale and the zero point that the operator itself finds."""
    rounded = NodeProto()
    rounded.CopyFrom(node)
    rounded.name = f"{node.name}_rounded"
    rounded.output[0] = f"{node.output[0]}_rounded"
    draft.nodes.append(rounded)
    _place_on_grid(draft, node.input[0], *node.output[1:], output=node.output[0])


def _place_on_grid(draft: Draft, x: str, scale: str, zero: str, *, output: str) -> None:
    wide = [draft.cast(n, _DOUBLE, f"{output}_{i}_wide") for i, n in enumerate((x, scale, zero))]
    steps = draft.node("Div", wide[:2], f"{output}_steps")
    draft.node("Add", [steps, wide[2]], output)


def _dequantize(draft: Draft, node: NodeProto) -> None:
    """(q − zero point)·scale, of what ``_quantize`` gives."""
    output = node.output[0]
    wide = [draft.cast(n, _DOUBLE, f"{output}_{i}_wide") for i, n in enumerate(node.input)]
    steps = draft.node("Sub", [wide[0], wide[2]], f"{output}_steps")
    draft.cast(draft.node("Mul", [steps, wide[1]], f"{output}_product"), _FLOAT, output)


def _multiply(draft: Draft, node: NodeProto) -> None:
    """(q − zero point) @ codes."""
    output = node.output[0]
    wide = [
        draft.cast(n, _DOUBLE, f"{output}_{i}_wide")
        for i, n in enumerate((node.input[0], node.input[2]))
    ]
    steps = draft.node("Sub", wide, f"{output}_steps")
    single = draft.cast(steps, _FLOAT, f"{output}_single")
    codes = draft.cast(node.input[1], _FLOAT, f"{output}_codes")
    draft.node("MatMul", [single, codes], output)


def _unpack(draft: Draft, node: NodeProto, stored: dict[str, tuple[int, ...]]) -> None:
    """codes·scale of a weight; onnxruntime may round activations where it meets the operator."""
    output, codes, scale = node.output[0], *node.input[:2]
    axis = next(attribute.i for attribute in node.attribute if attribute.name == "axis")
    sides = [1] * len(stored[codes])
    sides[axis] = stored[codes][axis]
    number = draft.cast(codes, _FLOAT, f"{output}_number")
    shape = draft.constant(f"{output}_sides", np.array(sides, np.int64))
    draft.node("Mul", [number, draft.node("Reshape", [scale, shape], f"{output}_side")], output)


_COUNTERPARTS: dict[str, Callable[[Draft, NodeProto], None]] = {
    "QuantizeLinear": _quantize,
    "DynamicQuantizeLinear": _quantize_dynamic,
    "DequantizeLinear": _dequantize,
    "MatMulInteger": _multiply,
}
