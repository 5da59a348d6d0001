"""Where a program's taps are in its TFLite file: the converter drops the names of nodes."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dinoexport.errors import BuildError
from dinoexport.graph.capture import CapturedProgram
from dinoexport.targets.tflite.graph import Graph
from dinoexport.targets.tflite.lower import read_graph, write_debug_file
from dinoexport.targets.tflite.origins import Origins
from dinoexport.targets.tflite.runtime import CHANNELS_LAST
from dinoexport.targets.tflite.values import locate_values


@dataclass(frozen=True)
class DebugFile:
    """The same graph with its taps as outputs, on disk: with the file that ships, and what converts
    it, it would fill the memory.

    Attributes:
        path: of the file.
        shapes: {input: (1, H, W, 3)}.
        origins: {tap: digest of what it is computed from, and that of its channels-last form, None
            where it has none}.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    origins: dict[str, tuple[bytes, bytes | None]]

    def locate(self, shipped: Graph) -> dict[str, str]:
        """Find each tap's tensor in the file that ships.

        A tap is the first tensor that is computed from the same constants by the same operators
        (see ``Origins``), as it is or as the channels-last form of a map. The converter may write
        other operators where a tap is an output; then it is the first tensor that holds the same
        bits (see ``locate_values``).

        Returns:
            {tap: name of its tensor}, behind ``CHANNELS_LAST`` where it is such a form.

        Raises:
            BuildError: a tap cannot be found so, or its tensor's name is not unique.
        """
        # So that tensors keep their numbers when the file is encoded.
        shipped.drop_unread_()
        found = Origins(shipped).results()
        places: dict[str, tuple[int, bool]] = {}
        for tap, (digest, turned) in self.origins.items():
            if digest in found:
                places[tap] = (found[digest], False)
            elif turned in found:
                places[tap] = (found[turned], True)
        others = [tap for tap in self.origins if tap not in places]
        if others:
            debug = read_graph(self.path).encode()
            places |= locate_values(shipped.encode(), debug, others, self.shapes)
        lost = next((tap for tap in self.origins if tap not in places), None)
        if lost is not None:
            raise BuildError(f"tflite: tap {lost} is not in the shipped file")
        return {
            tap: (CHANNELS_LAST if last else "") + _unique_name(shipped, index)
            for tap, (index, last) in ((tap, places[tap]) for tap in self.origins)
        }


@contextmanager
def debug_file(program: CapturedProgram) -> Iterator[DebugFile]:
    """Convert a program with its taps as outputs, if it has any, into a temporary file.

    Raises:
        BuildError: see ``lower``.
    """
    with tempfile.TemporaryDirectory(prefix="dinoexport-") as folder:
        path = Path(folder) / "debug.tflite"
        shapes = {name: tuple(x.shape) for name, x in program.sample_inputs().items()}
        yield DebugFile(path, shapes, _convert(program, path) if program.tap_nodes else {})


def _convert(program: CapturedProgram, path: Path) -> dict[str, tuple[bytes, bytes | None]]:
    """Write the file, and return the origins of its taps."""
    write_debug_file(program, path)
    graph = read_graph(path)
    origins, ports = Origins(graph), graph.ports("outputs")
    return {
        tap: (origins.of(ports[tap]), origins.channels_last(ports[tap]))
        for tap in program.tap_nodes
    }


def _unique_name(graph: Graph, index: int) -> str:
    """Return a tensor's name, which stays the same when the file is quantised."""
    name = graph.name(index)
    if graph.names().count(name) != 1:
        raise BuildError(f"tflite: tensor name {name} is not unique, so it locates no tap")
    return name
