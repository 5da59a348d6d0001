"""Where taps of a debug file are in the file that ships: by operators, by values, or not at all."""

from collections.abc import Callable
from copy import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dinoexport.bundle import open_bundle
from dinoexport.errors import BuildError
from dinoexport.targets.tflite import taps
from dinoexport.targets.tflite.graph import Graph, Kind, Type
from dinoexport.targets.tflite.runtime import CHANNELS_LAST

pytestmark = pytest.mark.e2e
TO_NCHW = (0, 3, 1, 2)


@pytest.fixture
def content(built: Callable[[str, str], Path]) -> bytes:
    return open_bundle(built("tflite", "fp32")).artifact.read_bytes()


def results(graph: Graph, kind: int) -> list[int]:
    """What operators of a kind give, in running order."""
    return [o.outputs[0] for o in graph.operators if graph.kind(o) == kind]


def layer(graph: Graph) -> int:
    """What the second linear layer gives."""
    return results(graph, Kind.FULLY_CONNECTED)[1]


def with_taps(graph: Graph, places: dict[str, int]) -> Graph:
    """Return a graph with taps as its outputs, as a debug file has them."""
    signature = graph._model.signatureDefs[0]
    ports = [copy(signature.outputs[0]) for _ in places]
    for port, (name, index) in zip(ports, places.items(), strict=True):
        port.name, port.tensorIndex = name.encode(), index
    signature.outputs = ports
    graph._graph.outputs = [*places.values()]
    return graph


def locate(monkeypatch: pytest.MonkeyPatch, debug: Graph, shipped: bytes) -> dict[str, str]:
    """Locate the outputs of a debug file in another."""
    images = {n: torch.zeros(debug.shape(i)) for n, i in debug.ports("inputs").items()}
    names = dict.fromkeys(debug.ports("outputs"), "")
    program: Any = SimpleNamespace(tap_nodes=names, sample_inputs=lambda: images)
    monkeypatch.setattr(taps, "write_debug_file", lambda _, path: debug.save(path))
    with taps.debug_file(program) as file:
        return file.locate(Graph(shipped))


def times(graph: Graph, index: int, factor: float) -> int:
    """Add the product of a tensor and a number."""
    shape = graph.shape(index)
    number = graph.add_constant("number", (1,), Type.FLOAT32, np.array([factor], np.float32))
    product = graph.add_tensor("product", shape, Type.FLOAT32)
    graph.operators.append(graph.operator(Kind.MUL, 1, [index, number], [product]))
    return product


def turned(graph: Graph, index: int) -> int:
    """Add the (B, C, H, W) form of a (B, H, W, C) tensor."""
    shape = [graph.shape(index)[axis] for axis in TO_NCHW]
    order = graph.add_constant("order", (4,), Type.INT32, np.array(TO_NCHW, np.int32))
    result = graph.add_tensor("turned", shape, Type.FLOAT32)
    graph.operators.append(graph.operator(Kind.TRANSPOSE, 1, [index, order], [result]))
    return result


def test_a_tap_is_found_by_what_it_is_computed_from(content: bytes, monkeypatch) -> None:
    def run_nothing(*_: Any) -> None:
        raise AssertionError("digests are enough")

    monkeypatch.setattr(taps, "locate_values", run_nothing)
    graph = Graph(content)
    patches = results(graph, Kind.CONV_2D)[0]
    wanted = graph.name(layer(graph)), graph.name(patches)
    debug = with_taps(graph, {"tap": layer(graph), "map": turned(graph, patches)})
    found = locate(monkeypatch, debug, content)
    # A RESHAPE before it may hold the same values and come first.
    assert found["tap"].removeprefix(CHANNELS_LAST) == wanted[0]
    assert found["map"] == CHANNELS_LAST + wanted[1]


def test_a_tap_of_other_operators_is_found_by_its_values(content: bytes, monkeypatch) -> None:
    graph = Graph(content)
    index, patches = layer(graph), results(graph, Kind.CONV_2D)[0]
    wanted = graph.name(index), graph.name(patches)
    # Times one: other operators, the same bits.
    same, like = times(graph, index, 1.0), turned(graph, times(graph, patches, 1.0))
    found = locate(monkeypatch, with_taps(graph, {"tap": same, "map": like}), content)
    assert found == {"tap": wanted[0], "map": CHANNELS_LAST + wanted[1]}


def test_a_tap_that_is_absent_is_told(content: bytes, monkeypatch) -> None:
    graph = Graph(content)
    changed = times(graph, layer(graph), 1 + 2**-22)
    with pytest.raises(BuildError, match="tap lost is not in the shipped file"):
        locate(monkeypatch, with_taps(graph, {"lost": changed}), content)


def test_a_name_that_two_tensors_have_locates_nothing(content: bytes, monkeypatch) -> None:
    graph, shipped = Graph(content), Graph(content)
    index = layer(graph)
    other = results(shipped, Kind.FULLY_CONNECTED)[2]
    shipped.tensor(other).name = shipped.tensor(index).name
    with pytest.raises(BuildError, match="is not unique"):
        locate(monkeypatch, with_taps(graph, {"tap": index}), shipped.encode())
