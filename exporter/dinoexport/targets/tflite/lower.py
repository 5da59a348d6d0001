"""Captured program → TFLite flatbuffer by litert-torch."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import litert_torch
import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from dinoexport.errors import BuildError
from dinoexport.graph.capture import CapturedProgram
from dinoexport.targets.adaptor import NhwcAdaptor
from dinoexport.targets.tflite.attention import widen_products_
from dinoexport.targets.tflite.graph import Graph, check_size

RECURSION_LIMIT = 100_000
"""As litert-torch sets it once it converts."""


def lower(program: CapturedProgram) -> Graph:
    """Convert the captured program behind a uint8 NHWC adaptor.

    Raises:
        BuildError: the converter cannot express an operation, the file passes 2 GB, or the
            temporary folder is too small.
    """
    with tempfile.TemporaryDirectory(prefix="dinoexport-") as folder:
        path = Path(folder) / "model.tflite"
        _convert(program, program.program, program.output_names, path)
        return read_graph(path)


def write_debug_file(program: CapturedProgram, path: Path) -> None:
    """Convert the same graph with its taps as further outputs, for ``read_graph``.

    Raises:
        BuildError: see ``lower``.
    """
    names = (*program.output_names, *program.tap_nodes)
    _convert(program, program.debug_program, names, path)


def read_graph(path: Path) -> Graph:
    """Read a file of the converter, and write its products as they ship."""
    graph = Graph(path.read_bytes())
    widen_products_(graph)
    return graph


def _convert(
    program: CapturedProgram, exported: ExportedProgram, output_names: tuple[str, ...], path: Path
) -> None:
    _check_space(path.parent, program.weight_bytes)
    check_size(program.weight_bytes)
    adaptor = NhwcAdaptor(exported, program.input_names, output_names)
    part_factors_(adaptor.core)
    try:
        # Light: the same operators (but for a constant that it folds better) in two thirds of the
        # memory.
        with _deep_recursion():
            litert_torch.convert(
                adaptor, sample_kwargs=program.sample_inputs(), lightweight_conversion=True
            ).export(str(path))
    except Exception as error:  # the converter raises types of several libraries
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
        raise BuildError(f"tflite: the converter failed: {reason}") from error
    program.rest()


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


def _check_space(folder: Path, weight_bytes: int) -> None:
    """Refuse a temporary folder that is too small: LLVM, unable to write, ends the process."""
    needed = 32 * 2**20 + weight_bytes
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BuildError(
            f"tflite: {folder.parent}: {free / 2**20:.0f} MiB free, the converter needs about "
            f"{needed / 2**20:.0f} there. Free some space or set TMPDIR to another folder."
        )
