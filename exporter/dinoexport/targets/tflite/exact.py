"""The exact form of a quantised TFLite file, for the structural gate: its own graph and stored
numbers in float32 arithmetic, without rounding of activations.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinoexport.targets.tflite.graph import TORCH_ORDER, Graph, Kind, Type

_CODES = (Type.INT8, Type.INT4)
_WIDE = {Type.INT32: np.int32, Type.INT64: np.int64}
_HALF_A_STEP = 0.501


def to_exact_form_(graph: Graph) -> None:
    """Make a file compute with the stored numbers in float32, in place.

    Integer weights become the numbers that they stand for; QUANTIZE and DEQUANTIZE are left out.
    A bias of integers is rounded to the step of its products, which float arithmetic has no reason
    to do: it is read in float where the integers are those numbers rounded, and as the integers
    otherwise.
    """
    floats: dict[int, int] = {}
    for operator in graph.operators:
        if graph.kind(operator) == Kind.QUANTIZE:
            floats[operator.outputs[0]] = operator.inputs[0]
        elif graph.kind(operator) == Kind.DEQUANTIZE:
            source, target = operator.inputs[0], operator.outputs[0]
            if not graph.data(source):
                floats[source] = target
            elif graph.tensor(source).type in _CODES:
                floats[target] = _constant(graph, source, _weight(graph, source))
    operators: list[Any] = []
    for operator in graph.operators:
        if not floats.keys().isdisjoint(_rounds(graph, operator)):
            continue
        operator.inputs = [floats.get(i, i) for i in operator.inputs]
        operator.outputs = [floats.get(i, i) for i in operator.outputs]
        if graph.kind(operator) in TORCH_ORDER:
            _unpack_(graph, operator)
        operators.append(operator)
    graph.operators = operators


def _rounds(graph: Graph, operator: Any) -> list[int]:
    """Return what an operator reads and gives, if it only turns numbers into others."""
    if graph.kind(operator) in (Kind.QUANTIZE, Kind.DEQUANTIZE):
        return [*operator.inputs, *operator.outputs]
    return []


def _unpack_(graph: Graph, operator: Any) -> None:
    """Give a layer float weights and a float bias."""
    weight = operator.inputs[1]
    if graph.tensor(weight).type in _CODES:
        operator.inputs[1] = _constant(graph, weight, _weight(graph, weight))
    bias = operator.inputs[2] if len(operator.inputs) > 2 else -1
    if bias >= 0 and graph.tensor(bias).type in _WIDE:
        operator.inputs[2] = _constant(graph, bias, _bias(graph, bias))


def _constant(graph: Graph, source: int, values: NDArray[np.floating]) -> int:
    name, shape = f"{graph.name(source)}/exact", graph.shape(source)
    return graph.add_constant(name, shape, Type.FLOAT32, values.astype(np.float32))


def _weight(graph: Graph, index: int) -> NDArray[np.float64]:
    """Return what integer weights stand for.

    Kernels take their zero points for 0; a file in which they are not is a wrong one.
    """
    record = graph.tensor(index).quantization
    if graph.tensor(index).type == Type.INT4:
        return _blocks(graph, index, record.details)
    codes = np.frombuffer(graph.data(index), np.int8).reshape(graph.shape(index))
    shape = [1] * codes.ndim
    shape[record.quantizedDimension] = -1
    zero = np.asarray(record.zeroPoint, np.float64).reshape(shape)
    return (codes - zero) * np.asarray(record.scale, np.float64).reshape(shape)


def _blocks(graph: Graph, index: int, details: Any) -> NDArray[np.float64]:
    """Return what 4-bit integers stand for, two to a byte, the first one in the lower half."""
    pairs = np.frombuffer(graph.data(index), np.uint8)
    codes = np.stack((pairs & 15, pairs >> 4), axis=-1).astype(np.float64)
    codes = np.where(codes > 7, codes - 16, codes).reshape(-1, details.blockSize)
    scales = np.frombuffer(graph.data(details.scales), np.float16).astype(np.float64)
    return (codes * scales[:, None]).reshape(graph.shape(index))


def _bias(graph: Graph, index: int) -> NDArray[np.float64]:
    record = graph.tensor(index).quantization
    codes = np.frombuffer(graph.data(index), _WIDE[graph.tensor(index).type])
    scale = np.asarray(record.scale, np.float64)
    stored = codes * scale
    if record.min is None:
        return stored
    meant = np.asarray(record.min, np.float64)
    rounded = np.abs(stored - meant) <= _HALF_A_STEP * scale
    return np.where(rounded, meant, stored)
