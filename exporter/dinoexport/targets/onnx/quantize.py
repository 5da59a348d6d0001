"""Half precision for ONNX.

The decoder stays in float32: half precision holds whole numbers only to 2048. So do the means and
variances of group normalisations, for squares of activations above 256 pass its range.
"""

from collections.abc import Collection

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from dinoexport.targets.onnx.draft import replace_nodes_

FLOAT_KINDS = frozenset({"InstanceNormalization"})
"""Operators that stay in float32 wherever they stand; a GroupNorm is written as one of these."""

FLOAT_INPUTS = {"Resize": (1, 2)}
"""Inputs that are float32 by definition, by their place: a resize's region and scales."""


def to_half_precision_(model: ModelProto, float_nodes: Collection[str]) -> None:
    """Store weights and compute activations in float16, except what produces ``float_nodes``, what
    reads them, and ``FLOAT_KINDS``.

    A value that crosses the border is cast; model outputs stay float32.

    Args:
        model: changed in place.
        float_nodes: names of values (captured nodes) that stay in float32.
    """
    graph = model.graph
    outputs = {value.name for value in graph.output}
    kept = _kept_nodes(graph.node, set(float_nodes) | outputs)
    alone = {i for i, node in enumerate(graph.node) if node.op_type in FLOAT_KINDS} - kept
    in_float = kept | alone
    readers: dict[str, set[bool]] = {}
    for index, node in enumerate(graph.node):
        for place, name in enumerate(node.input):
            in_single = index in in_float or place in FLOAT_INPUTS.get(node.op_type, ())
            readers.setdefault(name, set()).add(in_single)

    for tensor in list(graph.initializer):
        if tensor.data_type != TensorProto.FLOAT or True not in readers.get(tensor.name, {False}):
            if tensor.data_type == TensorProto.FLOAT:
                convert_tensor_(tensor, np.float16)
            continue
        if False in readers[tensor.name]:
            # Read on both sides of the border: the half-precision side gets its own copy.
            half = TensorProto()
            half.CopyFrom(tensor)
            half.name = f"{tensor.name}_half"
            convert_tensor_(half, np.float16)
            graph.initializer.append(half)
            for index, node in enumerate(graph.node):
                if index not in in_float and node.op_type not in FLOAT_INPUTS:
                    _rename_input_(node, tensor.name, half.name)

    half_values: set[str] = set()
    nodes: list[NodeProto] = []
    casts: dict[str, str] = {}
    for index, node in enumerate(graph.node):
        if index not in in_float:
            retarget_casts_(node, TensorProto.FLOAT, TensorProto.FLOAT16)
            half_values.update(node.output)
            nodes.append(node)
            continue
        for name in [n for n in node.input if n in half_values]:
            if name not in casts:
                casts[name] = f"{name}_float"
                nodes.append(
                    onnx.helper.make_node(
                        "Cast", [name], [casts[name]], f"cast_{name}", to=TensorProto.FLOAT
                    )
                )
            _rename_input_(node, name, casts[name])
        nodes.append(node)
        if index in alone:
            half_values.update(node.output)
            nodes += _cast_after_(node)
    replace_nodes_(model, nodes)


def _cast_after_(node: NodeProto) -> list[NodeProto]:
    """Rename the outputs of a node in place, and return casts that give the old names in half."""
    casts = []
    for place, name in enumerate(node.output):
        wide = f"{name}_wide"
        casts.append(
            onnx.helper.make_node("Cast", [wide], [name], f"cast_{wide}", to=TensorProto.FLOAT16)
        )
        node.output[place] = wide
    return casts


def _kept_nodes(nodes, names: set[str]) -> set[int]:
    """Indices of the nodes that produce one of ``names`` or read a kept node's value."""
    values: set[str] = set(names)
    kept: set[int] = set()
    for index, node in enumerate(nodes):
        if values.intersection(node.output) or values.intersection(node.input):
            kept.add(index)
            values.update(node.output)
    return kept


def convert_tensor_(tensor: TensorProto, dtype: type) -> None:
    """Change the type of a tensor in place."""
    array = numpy_helper.to_array(tensor).astype(dtype)
    converted = numpy_helper.from_array(array, tensor.name)
    tensor.CopyFrom(converted)


def _rename_input_(node: NodeProto, old: str, new: str) -> None:
    for index, name in enumerate(node.input):
        if name == old:
            node.input[index] = new


def retarget_casts_(node: NodeProto, source: int, target: int) -> None:
    """Give casts to a type, and constants of it, another type in place."""
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == source:
            attribute.i = target
        if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == source:
            dtype = np.float16 if target == TensorProto.FLOAT16 else np.float32
            convert_tensor_(attribute.t, dtype)
