"""The exact form of a quantised TFLite file, for the structural gate: its own graph and stored
numbers in float32 arithmetic, without rounding of activations.
"""

from typing import Any

import numpy as np

from dinoexport.targets.tflite.graph import Graph, Kind, Type

_INTEGERS = (Type.INT4, Type.INT8, Type.INT16)
_WIDE = {Type.INT32: np.int32, Type.INT64: np.int64}
_HALF_A_STEP = 0.501


def exact_form(content: bytes) -> bytes:
    """Return a file in which LiteRT computes with the stored numbers in float32.

    Integer weights are unpacked by DEQUANTIZE, QUANTIZE and DEQUANTIZE of activations are left out.
    A bias of integers is rounded to the step of its products, which float arithmetic has no reason
    to do: it is read in float where the integers are those numbers rounded, and as the integers
    otherwise.
    """
    graph = Graph(content)
    floats: dict[int, int] = {}
    for operator in graph.operators:
        if graph.kind(operator) == Kind.QUANTIZE:
            floats[operator.outputs[0]] = operator.inputs[0]
        elif graph.kind(operator) == Kind.DEQUANTIZE and not graph.data(operator.inputs[0]):
            floats[operator.inputs[0]] = operator.outputs[0]
    operators: list[Any] = []
    for operator in graph.operators:
        kind = graph.kind(operator)
        if kind == Kind.QUANTIZE or (kind == Kind.DEQUANTIZE and operator.inputs[0] in floats):
            continue
        if kind != Kind.DEQUANTIZE:
            operator.inputs = [floats.get(i, i) for i in operator.inputs]
            operator.outputs = [floats.get(i, i) for i in operator.outputs]
        if kind in (Kind.FULLY_CONNECTED, Kind.CONV_2D, Kind.DEPTHWISE_CONV_2D):
            _unpack_(graph, operator, operators)
        operators.append(operator)
    graph.operators = operators
    return graph.encode()


def _unpack_(graph: Graph, operator: Any, operators: list[Any]) -> None:
    """Give a layer float weights and a float bias."""
    weight = operator.inputs[1]
    if graph.tensor(weight).type in _INTEGERS:
        name, shape = f"{graph.name(weight)}/exact{len(operators)}", graph.shape(weight)
        unpacked = graph.add_tensor(name, shape, Type.FLOAT32)
        operators.append(graph.operator(Kind.DEQUANTIZE, 5, [weight], [unpacked]))
        operator.inputs[1] = unpacked
    bias = operator.inputs[2] if len(operator.inputs) > 2 else -1
    if bias >= 0 and graph.tensor(bias).type in _WIDE:
        name, shape = f"{graph.name(bias)}/exact{len(operators)}", graph.shape(bias)
        operator.inputs[2] = graph.add_constant(name, shape, Type.FLOAT32, _bias(graph, bias))


def _bias(graph: Graph, index: int) -> np.ndarray:
    record = graph.tensor(index).quantization
    codes = np.frombuffer(graph.data(index), _WIDE[graph.tensor(index).type])
    scale = np.asarray(record.scale, np.float64)
    stored = codes * scale
    if record.min is None:
        return stored.astype(np.float32)
    meant = np.asarray(record.min, np.float32)
    rounded = np.abs(stored - meant) <= _HALF_A_STEP * scale
    return np.where(rounded, meant, stored).astype(np.float32)
