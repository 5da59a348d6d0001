"""Weights beside the graph: protobuf holds 2 GB, and what checks a graph need not carry them.

up to 2 GB    model.onnx
above         model.onnx, which names model.onnx.data: offset and length of each weight
"""

import math
from pathlib import Path

import onnx
from onnx import ModelProto, TensorProto, ValueInfoProto

from dinoexport.errors import BuildError

LIMIT = onnx.checker.MAXIMUM_PROTOBUF
"""Bytes of the largest file that is written in one piece."""
DATA_SUFFIX = ".data"
_SMALL = 1024
"""Numbers up to which a constant may be a shape, which shape inference reads."""
_ALIGNMENT = 4096
"""Of each weight in the file of weights, so that runtimes can map it into memory."""


def outline(model: ModelProto) -> ModelProto:
    """Return a copy of a model in which large constants are inputs of their type and shape."""
    copy = ModelProto()
    copy.ir_version = model.ir_version
    copy.producer_name, copy.producer_version = model.producer_name, model.producer_version
    copy.opset_import.extend(model.opset_import)
    copy.metadata_props.extend(model.metadata_props)
    copy.functions.extend(model.functions)
    graph = copy.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    graph.value_info.extend(model.graph.value_info)
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= _SMALL and not is_external(tensor):
            graph.initializer.append(tensor)
        else:
            graph.input.append(_port(tensor))
    return copy


def infer_types(model: ModelProto) -> list[ValueInfoProto]:
    """Return the types of all inner values.

    Raises:
        onnx.shape_inference.InferenceError: the graph contradicts itself.
    """
    found = onnx.shape_inference.infer_shapes(outline(model), strict_mode=True)
    return list(found.graph.value_info)


def check(model: ModelProto) -> None:
    """Check a model as ONNX does, without copying its weights, and their sizes.

    Raises:
        BuildError: the checker or shape inference refuses it, or a weight has not the bytes that
            its shape and type ask for.
    """
    shape = outline(model)
    try:
        onnx.checker.check_model(shape, full_check=True)
        onnx.shape_inference.infer_shapes(shape, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BuildError(f"onnx: the checker refuses the model: {error}") from error
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) > _SMALL and len(tensor.raw_data) != _bytes_of(tensor):
            raise BuildError(
                f"onnx: weight {tensor.name} has {len(tensor.raw_data)} bytes where its shape and "
                f"type ask for {_bytes_of(tensor)}. Please report the checkpoint's configuration."
            )


def write(model: ModelProto, path: Path) -> None:
    """Write a model, with its large weights in a file of their own if it passes ``LIMIT``."""
    if size_of(model) < LIMIT:
        path.write_bytes(model.SerializeToString(deterministic=True))
        return
    light = outline(model)
    del light.graph.input[:]
    light.graph.input.extend(model.graph.input)
    del light.graph.initializer[:]
    data = path.with_name(path.name + DATA_SUFFIX)
    with data.open("wb") as file:
        for tensor in model.graph.initializer:
            if math.prod(tensor.dims) <= _SMALL:
                light.graph.initializer.append(tensor)
                continue
            file.write(bytes(-file.tell() % _ALIGNMENT))
            _refer_(light.graph.initializer.add(), tensor, data.name, file.tell())
            file.write(tensor.raw_data)
    path.write_bytes(light.SerializeToString(deterministic=True))


def size_of(model: ModelProto) -> int:
    """Return the bytes of a model as one file; protobuf itself cannot count beyond its 2 GB."""
    weights = sum(len(t.raw_data) for t in model.graph.initializer if math.prod(t.dims) > _SMALL)
    return weights + outline(model).ByteSize()


def is_external(tensor: TensorProto) -> bool:
    """True where a tensor's numbers lie in another file."""
    return tensor.data_location == TensorProto.EXTERNAL


def _refer_(entry: TensorProto, tensor: TensorProto, location: str, offset: int) -> None:
    """Make an entry say where a tensor's numbers lie."""
    entry.name, entry.data_type = tensor.name, tensor.data_type
    entry.dims.extend(tensor.dims)
    entry.data_location = TensorProto.EXTERNAL
    facts = {"location": location, "offset": offset, "length": len(tensor.raw_data)}
    for key, value in facts.items():
        entry.external_data.add(key=key, value=str(value))


def _port(tensor: TensorProto) -> ValueInfoProto:
    return onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))


def _bytes_of(tensor: TensorProto) -> int:
    return math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
