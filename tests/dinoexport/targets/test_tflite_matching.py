"""Which operator of a TFLite file is which layer where weights do not tell, and convolutions."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from torch import Tensor, nn

from dinoexport.errors import BuildError
from dinoexport.graph.capture import CapturedProgram, _place
from dinoexport.quantize.prepare import prepare_
from dinoexport.recipes import PRECISIONS, parse_recipe
from dinoexport.targets.table import get_target
from dinoexport.targets.tflite.graph import Graph
from dinoexport.targets.tflite.lower import lower
from dinoexport.targets.tflite.quantize import _match, store_layers_
from dinoexport.verify.metrics import sqnr_db

pytestmark = pytest.mark.e2e
SIZE = (16, 16)


class Net(nn.Module):
    """Convolutions of three kinds, two linear layers of equal weights, and one that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.pointwise = nn.Conv2d(32, 32, 1)
        self.first = nn.Linear(32, 32)
        self.second = nn.Linear(32, 32)
        self.again = nn.Linear(32, 32)
        self.second.load_state_dict(self.first.state_dict())
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> tuple[Tensor]:
        """(1, 3, H, W) of 0..255 → (1, 64, 32)."""
        x = self.stem(pixels / 255).relu()
        x = self.pointwise(self.depthwise(x)).relu().flatten(2).transpose(1, 2)
        x = self.second(self.first(x).relu())
        return (self.again(self.again(x).relu()),)


def captured(recipe: str) -> tuple[Net, CapturedProgram]:
    net = Net()
    parsed = parse_recipe(recipe)
    layers = prepare_(net, parsed)
    program = torch.export.export(net, (torch.zeros(1, 3, *SIZE),)).run_decompositions({})
    placed = _place(program, layers)
    return net, CapturedProgram(
        program, program, SIZE, ("image",), ("y",), {}, frozenset(), parsed, placed
    )


def with_precisions(program: CapturedProgram, names: dict[str, str]) -> CapturedProgram:
    layers = {
        name: dataclasses.replace(layer, precision=PRECISIONS[names.get(name, "w8")])
        for name, layer in program.layers.items()
    }
    return dataclasses.replace(program, layers=layers)


@pytest.fixture(scope="module")
def eight() -> tuple[Net, CapturedProgram, bytes]:
    net, program = captured("w8")
    return net, program, lower(program).encode()


def run(path: Path, image: np.ndarray, exact: bool) -> np.ndarray:
    return get_target("tflite").runtime(path, exact=exact).run({"image": image}).outputs["y"]


@pytest.mark.parametrize("exact", [False, True])
def test_convolutions_of_every_kind_have_their_numbers(eight, tmp_path, exact):
    net, program, content = eight
    path = tmp_path / "net.tflite"
    graph = Graph(content)
    store_layers_(graph, program)
    graph.save(path)
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    (wanted,) = net(torch.from_numpy(image).permute(2, 0, 1)[None].float())
    # Float arithmetic in another order: 130 dB and more, a wrong scale leaves 30.
    assert sqnr_db(wanted.numpy(), run(path, image, exact)) > 110
    details = Interpreter(model_path=str(path)).get_tensor_details()
    assert sum(d["dtype"] is np.int8 for d in details) >= 5


def owners(content: bytes, program: CapturedProgram) -> list[str]:
    """The layer of each operator that is one, in running order."""
    found = _match(Graph(content), program)
    return [found[index].name for index in sorted(found)]


def test_layers_of_equal_weights_are_told_apart_by_their_order(eight):
    _, program, content = eight
    other = with_precisions(program, {"second": "w8a8-dynamic"})
    assert owners(content, other) == [
        "stem",
        "depthwise",
        "pointwise",
        "first",
        "second",
        "again",
        "again",
    ]


def test_layers_that_cannot_be_told_apart_are_refused(eight):
    _, program, content = eight
    other = with_precisions(program, {"second": "w8a8-dynamic"})
    # As if the converter had computed two runs at once.
    graph = other.program.graph
    node = next(node for node in graph.nodes if node.name == program.layers["first"].node)
    with graph.inserting_after(node):
        shared = graph.call_function(node.target, node.args)
    with pytest.raises(BuildError, match="first, second hold equal weights and cannot be told"):
        owners(content, other)
    graph.erase_node(shared)


def test_changed_weights_are_refused(eight, monkeypatch):
    _, program, content = eight
    state = program.program.state_dict
    weight = program.layers["stem"].weight
    monkeypatch.setitem(state, weight, state[weight] * 2)
    with pytest.raises(BuildError, match="the converter changed the weights of stem"):
        owners(content, program)
