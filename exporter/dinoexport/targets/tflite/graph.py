"""A TFLite file as objects that can be changed: quantising and the exact form both rewrite it."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from dinoexport.errors import BuildError

IDENTIFIER = b"TFL3"
MAX_BYTES = 2**31 - 2**20
Kind = schema.BuiltinOperator
Type = schema.TensorType
TORCH_ORDER = {
    Kind.FULLY_CONNECTED: (0, 1),
    Kind.CONV_2D: (0, 3, 1, 2),
    Kind.DEPTHWISE_CONV_2D: (3, 0, 1, 2),
}
"""Axes of an operator's weights in the order that PyTorch has them in, output channels first."""
_DEPRECATED_CODE_END = 127
"""Readers of old files look at a byte, which says this of every later operator."""


class Graph:
    """The only subgraph of a file, with operators that may be replaced.

    Args:
        content: a flatbuffer.

    Attributes:
        operators: in running order.
    """

    def __init__(self, content: bytes) -> None:
        self._model: Any = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
        self._graph: Any = self._model.subgraphs[0]
        self.operators: list[Any] = list(self._graph.operators)
        for operator in self.operators:
            operator.inputs = [int(i) for i in operator.inputs]
            operator.outputs = [int(i) for i in operator.outputs]
        for buffer in self._model.buffers:
            if buffer.size:  # a file may keep numbers behind the flatbuffer
                end = buffer.offset + buffer.size
                buffer.data = np.frombuffer(content[buffer.offset : end], np.uint8)
                buffer.offset = buffer.size = 0

    def kind(self, operator: Any) -> int:
        """Return an operator's kind, one of ``Kind``."""
        return self._model.operatorCodes[operator.opcodeIndex].builtinCode

    def version(self, operator: Any) -> int:
        """Return the version of an operator's kernel."""
        return self._model.operatorCodes[operator.opcodeIndex].version

    def ports(self, side: str) -> dict[str, int]:
        """Return the signature's ``inputs`` or ``outputs``: {name: tensor}."""
        signature = self._model.signatureDefs[0]
        return {port.name.decode(): int(port.tensorIndex) for port in getattr(signature, side)}

    def set_version(self, operator: Any, version: int) -> None:
        """Ask for a kernel of at least this version."""
        code = self._model.operatorCodes[operator.opcodeIndex]
        if code.version < version:
            operator.opcodeIndex = self._code(code.builtinCode, version)

    def tensor(self, index: int) -> Any:
        """Return a tensor's record."""
        return self._graph.tensors[index]

    def shape(self, index: int) -> tuple[int, ...]:
        """Return a tensor's shape."""
        shape = self.tensor(index).shape
        return () if shape is None else tuple(int(side) for side in shape)

    def name(self, index: int) -> str:
        """Return a tensor's name."""
        return self.tensor(index).name.decode()

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return [tensor.name.decode() for tensor in self._graph.tensors]

    def data(self, index: int) -> bytes:
        """Return the bytes of a constant, none for any other tensor."""
        return self.view(index).tobytes()

    def view(self, index: int) -> NDArray[np.uint8]:
        """Return the bytes of a constant as they lie in memory, none for any other tensor."""
        data = self._model.buffers[self.tensor(index).buffer].data
        return np.empty(0, np.uint8) if data is None else np.asarray(data, np.uint8)

    def constant(self, index: int) -> NDArray[np.float32] | None:
        """Return a float32 constant in its shape, None for any other tensor."""
        if index < 0 or self.tensor(index).type != Type.FLOAT32:
            return None
        data = self.data(index)
        return np.frombuffer(data, np.float32).reshape(self.shape(index)) if data else None

    def add_tensor(
        self, name: str, shape: Sequence[int], kind: int, quantization: Any = None
    ) -> int:
        """Add a tensor that an operator fills; return its index."""
        tensor: Any = schema.TensorT()
        tensor.name = name.encode()
        tensor.shape = list(shape)
        tensor.type = kind
        tensor.buffer = 0
        tensor.quantization = quantization
        self._graph.tensors.append(tensor)
        return len(self._graph.tensors) - 1

    def add_constant(
        self,
        name: str,
        shape: Sequence[int],
        kind: int,
        values: NDArray[Any],
        quantization: Any = None,
    ) -> int:
        """Add a tensor that holds numbers; return its index."""
        index = self.add_tensor(name, shape, kind, quantization)
        buffer: Any = schema.BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
        self.tensor(index).buffer = len(self._model.buffers)
        self._model.buffers.append(buffer)
        return index

    def operator(self, kind: int, version: int, inputs: list[int], outputs: list[int]) -> Any:
        """Return a new operator without options; it runs once it is among ``operators``."""
        operator: Any = schema.OperatorT()
        operator.opcodeIndex = self._code(kind, version)
        operator.inputs = inputs
        operator.outputs = outputs
        return operator

    @property
    def outputs(self) -> set[int]:
        """Tensors that the file gives."""
        return set(map(int, self._graph.outputs))

    def add_outputs(self, names: Collection[str]) -> None:
        """Give further tensors as outputs, behind those of the file; its signature stays as it is.

        Args:
            names: of tensors; those that are not there, or are outputs already, are left out.
        """
        known = self.outputs
        more = [
            index
            for index, tensor in enumerate(self._graph.tensors)
            if tensor.name.decode() in names and index not in known
        ]
        self._graph.outputs = [*map(int, self._graph.outputs), *more]

    def add_metadata(self, metadata: Mapping[str, str]) -> None:
        """Add each pair as a metadata buffer of its own."""
        self._model.metadata = list(self._model.metadata or [])
        for key, value in sorted(metadata.items()):
            buffer: Any = schema.BufferT()
            buffer.data = np.frombuffer(value.encode(), dtype=np.uint8)
            entry = schema.MetadataT()
            entry.name = key
            entry.buffer = len(self._model.buffers)
            self._model.buffers.append(buffer)
            self._model.metadata.append(entry)
        self._model.description = f"dinoexport {metadata.get('name', '')}".strip()

    def encode(self) -> bytes:
        """Return the file, see ``drop_unread_``.

        Raises:
            BuildError: it passes the 2 GB of a flatbuffer.
        """
        return bytes(self.pack())

    def save(self, path: Path) -> None:
        """Write the file that ``encode`` gives.

        Raises:
            BuildError: it passes the 2 GB of a flatbuffer.
        """
        path.write_bytes(self.pack())

    def pack(self) -> memoryview:
        """Return the file where it was written, as ``encode`` gives it and without that copy.

        Raises:
            BuildError: it passes the 2 GB of a flatbuffer.
        """
        self.drop_unread_()
        held = sum(len(b.data) for b in self._model.buffers if b.data is not None)
        check_size(held)
        # All at once: a builder that grows by doubling holds a large file three times.
        builder = flatbuffers.Builder(held + 64 * len(self._model.buffers) + 2**20)
        builder.Finish(self._model.Pack(builder), file_identifier=IDENTIFIER)
        return memoryview(builder.Bytes)[builder.Head() :]

    def _code(self, kind: int, version: int) -> int:
        codes = self._model.operatorCodes
        for index, code in enumerate(codes):
            if code.builtinCode == kind and code.version == version:
                return index
        code: Any = schema.OperatorCodeT()
        code.builtinCode = kind
        code.deprecatedBuiltinCode = min(kind, _DEPRECATED_CODE_END)
        code.version = version
        codes.append(code)
        return len(codes) - 1

    def drop_unread_(self) -> None:
        """Drop tensors and numbers that nothing reads, and number the others anew."""
        self._graph.operators = self.operators
        ports = [int(i) for i in (*self._graph.inputs, *self._graph.outputs)]
        ends = [i for o in self.operators for i in (*o.inputs, *o.outputs) if i >= 0]
        blocks = {i: d for i in ends if (d := _blocks(self.tensor(i))) is not None}
        kept = sorted({*ports, *ends, *(details.scales for details in blocks.values())})
        place = {old: new for new, old in enumerate(kept)}
        for details in blocks.values():
            details.scales = place[details.scales]
        self._graph.tensors = [self._graph.tensors[old] for old in place]
        self._graph.inputs = [place[int(i)] for i in self._graph.inputs]
        self._graph.outputs = [place[int(i)] for i in self._graph.outputs]
        for operator in self.operators:
            operator.inputs = [place.get(i, i) for i in operator.inputs]
            operator.outputs = [place[i] for i in operator.outputs]
        for signature in self._model.signatureDefs or []:
            for port in (*signature.inputs, *signature.outputs):
                port.tensorIndex = place[port.tensorIndex]
        self._drop_buffers_()

    def _drop_buffers_(self) -> None:
        """Renumber buffers; the first one is empty by the format's rule."""
        readers = [*self._graph.tensors, *(self._model.metadata or [])]
        place = {old: new for new, old in enumerate(sorted({0, *(r.buffer for r in readers)}))}
        buffers = self._model.buffers
        self._model.buffers = [buffers[old] for old in place]
        for reader in readers:
            reader.buffer = place[reader.buffer]


def check_size(size_bytes: int) -> None:
    """Refuse a file that a flatbuffer cannot hold; readers would take it for a damaged one.

    Raises:
        BuildError: it passes ``MAX_BYTES``.
    """
    if size_bytes > MAX_BYTES:
        raise BuildError(
            f"tflite: the model has {size_bytes / 2**30:.1f} GiB of weights in float32, as it is "
            "converted; a flatbuffer holds 2. Use --target onnx,coreml or a smaller backbone."
        )


def per_channel(scale: NDArray[np.float32], axis: int = 0) -> Any:
    """Return the record of symmetric integers with a scale per channel."""
    record: Any = schema.QuantizationParametersT()
    record.scale = scale
    record.zeroPoint = np.zeros(len(scale), np.int64)
    record.quantizedDimension = axis
    return record


def per_block(scales: int, block: int) -> Any:
    """Return the record of symmetric integers with a scale per output channel and block of inputs.

    Args:
        scales: tensor that holds them in half precision, (out, blocks).
        block: inputs that share one.
    """
    details: Any = schema.BlockwiseQuantizationT()
    details.scales = scales
    details.zeroPoints = -1
    details.blockSize = block
    record: Any = schema.QuantizationParametersT()
    record.detailsType = schema.QuantizationDetails.BlockwiseQuantization
    record.details = details
    return record


def _blocks(tensor: Any) -> Any:
    """Return where the scales of a tensor's blocks are, None where it has no blocks."""
    record = tensor.quantization
    wanted = schema.QuantizationDetails.BlockwiseQuantization
    return record.details if record is not None and record.detailsType == wanted else None


def per_tensor(scale: float, zero_point: int) -> Any:
    """Return the record of integers with one scale."""
    record: Any = schema.QuantizationParametersT()
    record.scale = np.array([scale], np.float32)
    record.zeroPoint = np.array([zero_point], np.int64)
    return record
