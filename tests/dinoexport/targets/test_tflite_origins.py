"""Tensors of two TFLite files that are computed alike, and faults that must not pass for that."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinoexport.bundle import open_bundle
from dinoexport.errors import BuildError
from dinoexport.targets.tflite.graph import MAX_BYTES, Graph, Kind, check_size
from dinoexport.targets.tflite.origins import Origins
from dinoexport.targets.tflite.runtime import TfliteRuntime

pytestmark = pytest.mark.e2e


@pytest.fixture
def path(built: Callable[[str, str], Path]) -> Path:
    return open_bundle(built("tflite", "fp32")).artifact


def layers(graph: Graph) -> list[Any]:
    return [o for o in graph.operators if graph.kind(o) == Kind.FULLY_CONNECTED]


def write(graph: Graph, index: int, values: np.ndarray) -> None:
    buffer = graph._model.buffers[graph.tensor(index).buffer]
    buffer.data = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)


def changed_weight(graph: Graph, operator: Any) -> None:
    values = np.array(graph.constant(operator.inputs[1]))
    values.reshape(-1)[-1] = np.nextafter(values.reshape(-1)[-1], np.inf)
    write(graph, operator.inputs[1], values)


def changed_option(_graph: Graph, operator: Any) -> None:
    operator.builtinOptions.fusedActivationFunction = 1


def swapped_weights(graph: Graph, operator: Any) -> None:
    """As queries and keys would be taken for each other."""
    shape = graph.shape(operator.inputs[1])
    like = (o for o in layers(graph) if graph.shape(o.inputs[1]) == shape and o is not operator)
    operator.inputs[1] = next(like).inputs[1]


FAULTS = (changed_weight, changed_option, swapped_weights)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_any_change_before_a_tensor_shows(path: Path, fault: Callable[..., None]) -> None:
    graph, other = Graph(path.read_bytes()), Graph(path.read_bytes())
    operator = layers(other)[1]
    fault(other, operator)
    place = other.operators.index(operator)
    clean, wrong = Origins(graph), Origins(other)
    for before in graph.operators[:place]:
        assert clean.of(before.outputs[0]) == wrong.of(before.outputs[0])
    assert clean.of(operator.outputs[0]) != wrong.of(operator.outputs[0])
    # And behind it: the last result of all.
    last = graph.operators[-1].outputs[0]
    assert clean.of(last) != wrong.of(last)


def test_tensors_of_one_origin_hold_the_same_bits(path: Path, eyes) -> None:
    """A second operator like a first one is the same value; one that differs is not."""
    graph = Graph(path.read_bytes())
    first = layers(graph)[1]
    index = first.outputs[0]
    twin = graph.add_tensor("twin", graph.shape(index), graph.tensor(index).type)
    graph.operators.insert(graph.operators.index(first) + 1, _copy(first, [*first.inputs], [twin]))
    origins = Origins(graph)
    assert origins.of(twin) == origins.of(index)
    # The first in running order is taken.
    assert origins.results()[origins.of(twin)] == index
    names = {"first": graph.name(index), "twin": "twin"}
    changed = path.parent.parent / "twins.tflite"
    changed.write_bytes(graph.encode())
    found = TfliteRuntime(changed, names).run(eyes[0]).taps
    assert np.array_equal(found["first"], found["twin"])


def _copy(operator: Any, inputs: list[int], outputs: list[int]) -> Any:
    made = type(operator)()
    vars(made).update(vars(operator))
    made.inputs, made.outputs = inputs, outputs
    return made


def test_files_above_two_gigabytes_are_refused() -> None:
    check_size(MAX_BYTES)
    with pytest.raises(BuildError, match=r"2\.0 GiB of weights in float32") as error:
        check_size(MAX_BYTES + 1)
    assert "\n" not in str(error.value)
