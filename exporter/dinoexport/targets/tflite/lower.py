"""Captured program → TFLite flatbuffer by litert-torch; where its taps are; its metadata."""

import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import litert_torch
import numpy as np
import torch
from ai_edge_litert import schema_py_generated as schema
from torch.export import ExportedProgram
from torch.fx import GraphModule

from dinoexport.errors import BuildError
from dinoexport.graph.capture import CapturedProgram
from dinoexport.targets.adaptor import NhwcAdaptor
from dinoexport.targets.tflite.attention import widen_products_
from dinoexport.targets.tflite.graph import Graph, check_size, encode
from dinoexport.targets.tflite.origins import Origins
from dinoexport.targets.tflite.runtime import CHANNELS_LAST
from dinoexport.targets.tflite.values import locate_values

RECURSION_LIMIT = 100_000
"""As litert-torch sets it once it converts."""


def lower(program: CapturedProgram) -> bytes:
    """Convert the captured program behind a uint8 NHWC adaptor.

    Raises:
        BuildError: the converter cannot express an operation, the file passes 2 GB, or the
            temporary folder is too small.
    """
    return _convert(program, program.program, program.output_names).encode()


def _convert(
    program: CapturedProgram, exported: ExportedProgram, output_names: tuple[str, ...]
) -> Graph:
    with tempfile.TemporaryDirectory(prefix="dinoexport-") as folder:
        path = Path(folder) / "model.tflite"
        _check_space(Path(folder), exported)
        check_size(_bytes_of(exported))
        adaptor = NhwcAdaptor(exported, program.input_names, output_names)
        part_factors_(adaptor.core)
        try:
            # Light: the same operators (but for a constant that it folds better) in two thirds of
            # the memory.
            with _deep_recursion():
                litert_torch.convert(
                    adaptor, sample_kwargs=program.sample_inputs(), lightweight_conversion=True
                ).export(str(path))
        except Exception as error:  # the converter raises types of several libraries
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
            raise BuildError(f"tflite: the converter failed: {reason}") from error
        content = path.read_bytes()
    graph = Graph(content)
    widen_products_(graph)
    return graph


@contextmanager
def _deep_recursion() -> Iterator[None]:
    """Let the converter copy graphs by recursion, for as long as it works.

    It raises Python's limit for good, and then a deeply nested file from outside, which is read in
    the same process, would overflow the stack and end it instead of being refused.
    """
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, RECURSION_LIMIT))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


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
    needed = 32 * 2**20 + _bytes_of(exported)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BuildError(
            f"tflite: {folder.parent}: {free / 2**20:.0f} MiB free, the converter needs about "
            f"{needed / 2**20:.0f} there. Free some space or set TMPDIR to another folder."
        )


def _bytes_of(exported: ExportedProgram) -> int:
    """Bytes of a program's weights as the converter writes them, in float32."""
    return sum(4 * tensor.numel() for tensor in exported.state_dict.values())


def locate_taps(content: bytes, program: CapturedProgram) -> dict[str, str]:
    """Find each tap's tensor in the file that ships.

    The converter drops node names, so a debug file is converted from the same graph with the taps
    as outputs. A tap is the first tensor of the shipped file that is computed from the same
    constants by the same operators (see ``Origins``), as it is or as the channels-last form of a
    map. The converter may write other operators where a tap is an output; then it is the first
    tensor that holds the same bits (see ``locate_values``).

    Returns:
        {tap: name of its tensor}, behind ``CHANNELS_LAST`` where it is such a form.

    Raises:
        BuildError: a tap cannot be found so, or its tensor's name is not unique.
    """
    names = (*program.output_names, *program.tap_nodes)
    debug = _convert(program, program.debug_program, names)
    wanted = Origins(debug)
    shipped = Graph(content)
    found = Origins(shipped).results()
    ports = debug.ports("outputs")
    places: dict[str, tuple[int, bool]] = {}
    for tap in program.tap_nodes:
        index = found.get(wanted.of(ports[tap]))
        turned = wanted.channels_last(ports[tap]) if index is None else None
        if index is not None:
            places[tap] = (index, False)
        elif turned in found:
            places[tap] = (found[turned], True)
    others = [tap for tap in program.tap_nodes if tap not in places]
    if others:
        shapes = {name: tuple(x.shape) for name, x in program.sample_inputs().items()}
        places |= locate_values(content, debug.encode(), others, shapes)
    lost = next((tap for tap in program.tap_nodes if tap not in places), None)
    if lost is not None:
        raise BuildError(f"tflite: tap {lost} is not in the shipped file")
    return {
        tap: (CHANNELS_LAST if last else "") + _unique_name(shipped, index)
        for tap, (index, last) in ((tap, places[tap]) for tap in program.tap_nodes)
    }


def _unique_name(graph: Graph, index: int) -> str:
    """Return a tensor's name, which stays the same when the file is quantised."""
    name = graph.name(index)
    if graph.names().count(name) != 1:
        raise BuildError(f"tflite: tensor name {name} is not unique, so it locates no tap")
    return name


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
    return encode(model)
