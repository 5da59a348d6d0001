"""Captured program → TFLite flatbuffer by litert-torch; where its taps are; its metadata."""

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flatbuffers
import litert_torch
import numpy as np
import torch
from ai_edge_litert import schema_py_generated as schema
from torch.export import ExportedProgram
from torch.fx import GraphModule

from dinoexport.errors import BuildError
from dinoexport.graph.capture import CapturedProgram
from dinoexport.targets.adaptor import NhwcAdaptor
from dinoexport.targets.tflite.attention import widen_products
from dinoexport.targets.tflite.graph import IDENTIFIER
from dinoexport.targets.tflite.runtime import CHANNELS_LAST, TfliteRuntime

MAX_BYTES = 2**31 - 2**20


def lower(program: CapturedProgram) -> bytes:
    """Convert the captured program behind a uint8 NHWC adaptor.

    Raises:
        BuildError: the converter cannot express an operation, the file passes 2 GB, or the
            temporary folder is too small.
    """
    return _convert(program, program.program, program.output_names)


def _convert(
    program: CapturedProgram, exported: ExportedProgram, output_names: tuple[str, ...]
) -> bytes:
    with tempfile.TemporaryDirectory(prefix="dinoexport-") as folder:
        path = Path(folder) / "model.tflite"
        _check_space(Path(folder), exported)
        adaptor = NhwcAdaptor(exported, program.input_names, output_names)
        part_factors_(adaptor.core)
        try:
            litert_torch.convert(adaptor, sample_kwargs=program.sample_inputs()).export(str(path))
        except Exception as error:  # the converter raises types of several libraries
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
            raise BuildError(f"tflite: the converter failed: {reason}") from error
        content = path.read_bytes()
    if len(content) > MAX_BYTES:
        raise BuildError(
            f"tflite: the model has {len(content) / 2**30:.1f} GiB, a flatbuffer holds 2. "
            "Build with a smaller backbone."
        )
    return widen_products(content)


def part_factors_(core: GraphModule) -> None:
    """Multiply by a LayerNorm's weight behind it, in place, where it has no bias: smoothed ones.

    litert-torch folds the weight of a LayerNorm into the linear layers that read it, which takes
    the smoothing back, and their stored codes no longer fit. A factor of its own it leaves alone.

    Before:  layer_norm(x; weight)
    After:   layer_norm(x) · weight
    """
    for node in list(core.graph.nodes):
        if node.target != torch.ops.aten.layer_norm.default or len(node.args) < 3:
            continue
        x, shape, weight, *rest = node.args
        if weight is None or (rest and rest[0] is not None):
            continue
        with core.graph.inserting_after(node):
            scaled = core.graph.call_function(torch.ops.aten.mul.Tensor, (node, weight))
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user, own=scaled: user is not own)
        node.args = (x, shape, None, *rest)
    core.recompile()


def _check_space(folder: Path, exported: ExportedProgram) -> None:
    """Refuse a temporary folder that is too small: LLVM, unable to write, ends the process."""
    needed = 32 * 2**20 + sum(4 * tensor.numel() for tensor in exported.state_dict.values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BuildError(
            f"tflite: {folder.parent}: {free / 2**20:.0f} MiB free, the converter needs about "
            f"{needed / 2**20:.0f} there. Free some space or set TMPDIR to another folder."
        )


def locate_taps(content: bytes, program: CapturedProgram) -> dict[str, str]:
    """Find each tap's tensor in the file that ships.

    The converter drops node names, so a debug file is converted from the same graph with the taps
    as outputs. A tap is the first tensor of the shipped file that, on random images, holds the same
    bits, in the same order or as the channels-last form of a map.

    Returns:
        {tap: name of its tensor}, behind ``CHANNELS_LAST`` where it is such a form.

    Raises:
        BuildError: a tap cannot be found so; or the two files hold other weights.
    """
    names = (*program.output_names, *program.tap_nodes)
    debug_content = _convert(program, program.debug_program, names)
    if weights_of(content) != weights_of(debug_content):
        raise BuildError("tflite: the debug file holds other weights than the shipped one")
    with tempfile.TemporaryDirectory(prefix="dinoexport-") as folder:
        path, debug_path = Path(folder) / "model.tflite", Path(folder) / "debug.tflite"
        path.write_bytes(content)
        debug_path.write_bytes(debug_content)
        shipped = TfliteRuntime(path, {}, keep_all=True)
        debug = TfliteRuntime(debug_path, {}, keep_all=True)
    rng = np.random.default_rng(0)
    images = {
        name: rng.integers(0, 256, (*program.image_size, 3), dtype=np.uint8)
        for name in program.input_names
    }
    shipped.run(images)
    debug_values = debug.run(images).outputs
    found: dict[bytes, int] = {}
    for index in shipped.results():
        found.setdefault(_bits(shipped.tensor(index)), index)
    places = {}
    for tap in program.tap_nodes:
        value = debug_values[tap]
        index = found.get(_bits(value))
        mark = ""
        if index is None and value.ndim == 4:
            index = found.get(_bits(value.transpose(0, 2, 3, 1)))
            mark = CHANNELS_LAST
        if index is None:
            raise BuildError(f"tflite: tap {tap} is not in the shipped file")
        places[tap] = mark + shipped.name_of(index)
    return places


def _bits(value: np.ndarray) -> bytes:
    """Digest of a tensor's values in their order, whatever its shape."""
    return hashlib.sha256(np.ascontiguousarray(value).tobytes()).digest()


def weights_of(content: bytes) -> list[bytes]:
    """Return all constant buffers of a flatbuffer, sorted: equal for equal weights."""
    model = schema.Model.GetRootAs(content, 0)
    buffers = [model.Buffers(i) for i in range(model.BuffersLength())]
    held = [bytes(np.asarray(b.DataAsNumpy())) for b in buffers if b is not None and b.DataLength()]
    # Small ones are shapes and versions, which follow the outputs.
    return sorted(data for data in held if len(data) > 64)


def embed_metadata(content: bytes, metadata: Mapping[str, str]) -> bytes:
    """Add each pair as a metadata buffer of its own."""
    model: Any = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    model.metadata = list(model.metadata or [])
    for key, value in sorted(metadata.items()):
        buffer: Any = schema.BufferT()
        buffer.data = np.frombuffer(value.encode(), dtype=np.uint8)
        entry = schema.MetadataT()
        entry.name = key
        entry.buffer = len(model.buffers)
        model.buffers.append(buffer)
        model.metadata.append(entry)
    model.description = f"dinoexport {metadata.get('name', '')}".strip()
    builder = flatbuffers.Builder(len(content) + 2**16)
    builder.Finish(model.Pack(builder), file_identifier=IDENTIFIER)
    return bytes(builder.Output())
