"""The captured program: static, in four dimensions, equal to eager, with its taps located."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves

from dinoexport.errors import BuildError
from dinoexport.graph.capture import (
    CapturedProgram,
    _downstream,
    capture,
    capture_deploy,
    export,
)
from dinoexport.graph.deploy_model import DeployModel
from dinoexport.passes.base import apply_passes
from dinoexport.passes.sequence import PASSES, build_deploy_model
from dinoexport.quantize.prepare import prepare_
from dinoexport.recipes import parse_recipe
from dinotrain.backbones.vit import ViTConfig, swiglu_hidden_dim
from dinotrain.encoding import Encoding
from dinotrain.heads.branch import HeadConfig
from dinotrain.heads.pool import FeatureConfig

TINY = ViTConfig(
    name="tiny", embed_dim=32, depth=1, heads=2, ffn_dim=48, grid=(2, 2), position_rule="size"
)
VARIANTS = {
    "cls-gray-soft": {
        "backbone": replace(TINY, depth=2, registers=2),
        "head": HeadConfig(hidden=16),
        "image_size": (28, 28),
    },
    "pyramid-ensemble-swiglu": {
        "backbone": replace(TINY, depth=2, ffn="swiglu", ffn_dim=swiglu_hidden_dim(32)),
        "features": FeatureConfig(kind="pyramid", taps=(0, 1, 0, 1), tap_norm="own_ln"),
        "head": HeadConfig(kind="ensemble", members=2, hidden=16),
        "encoding": Encoding(kind="plain", decoding="hard"),
        "image_size": (42, 70),
    },
    "linear-scalar": {
        "backbone": TINY,
        "head": HeadConfig(kind="linear"),
        "encoding": Encoding(kind="scalar"),
        "image_size": (28, 42),
    },
}
PRECISIONS = {"cls-gray-soft": "fp16", "pyramid-ensemble-swiglu": "fp32", "linear-scalar": "fp32"}
Case = tuple[CapturedProgram, DeployModel]


def rounded_(deploy: DeployModel, recipe: str) -> DeployModel:
    """Prepare a deploy model for a recipe, by its name."""
    prepare_(deploy, parse_recipe(recipe))
    return deploy


@pytest.fixture(scope="module", params=VARIANTS)
def case(request, random_model) -> Case:
    """A captured program, and the deploy model that it must equal, with taps."""
    model = random_model(**VARIANTS[request.param])
    precision = PRECISIONS[request.param]
    return capture(model, precision), rounded_(build_deploy_model(model, debug=True), precision)


@pytest.fixture(scope="module")
def scalar(random_model) -> CapturedProgram:
    """The smallest program, for tests that need only one."""
    return capture(random_model(**VARIANTS["linear-scalar"]))


def tensors(program: ExportedProgram) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a node of the graph gives, by the node's name."""
    for node in program.graph.nodes:
        for value in tree_leaves(node.meta.get("val")):
            if isinstance(value, torch.Tensor):
                yield node.name, value


def problems(program: ExportedProgram) -> set[str]:
    """What a phone's runtime could not take."""
    found = set()
    for name, value in tensors(program):
        if not all(type(side) is int for side in value.shape):
            found.add(f"{name}: dynamic")
        if value.ndim > 4:
            found.add(f"{name}: {value.ndim} dimensions")
        # Hard decoding compares logits with zero.
        if value.dtype not in (torch.float32, torch.bool):
            found.add(f"{name}: {value.dtype}")
    return found


def run_nodes(program: ExportedProgram, pixels: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Run a graph node by node on its own weights; every value by name."""
    given = iter(pixels)
    arguments = []
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            arguments.append(next(given))
        elif spec.target in program.state_dict:
            arguments.append(program.state_dict[spec.target])
        else:
            arguments.append(program.constants[spec.target])

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node):
            values[n.name] = super().run_node(n)
            return values[n.name]

    values: dict[str, Tensor] = {}
    with torch.no_grad():
        Recorder(program.graph_module).run(*arguments)
    return values


# --- shape and type ------------------------------------------------------------------------------


def test_every_tensor_is_static_float32_of_at_most_four_dimensions(case):
    captured, _ = case
    for program in (captured.program, captured.debug_program):
        assert len(dict(tensors(program))) > 50
        assert problems(program) == set()
        assert {n for n, v in tensors(program) if v.dtype == torch.bool} <= captured.decode_nodes


def test_inputs_and_outputs_are_those_of_the_contract(case):
    captured, deploy = case
    values = dict(tensors(captured.program))
    signature = captured.program.graph_signature
    inputs = [values[name] for name in signature.user_inputs]
    outputs = [values[name] for name in signature.user_outputs]
    assert captured.input_names == ("primary", "up", "down")
    assert [v.shape for v in inputs] == 3 * [(1, 3, *deploy.image_size)]
    assert captured.output_names == tuple(deploy.output_names)
    assert [v.shape for v in outputs] == len(deploy.output_names) * [(1,)]
    assert {v.dtype for v in (*inputs, *outputs)} == {torch.float32}
    assert not captured.program.range_constraints


def test_sample_inputs_are_what_an_app_passes(case):
    captured, deploy = case
    samples = captured.sample_inputs()
    assert tuple(samples) == captured.input_names
    for image in samples.values():
        assert image.dtype == torch.uint8
        assert image.shape == (1, *deploy.image_size, 3)


class FiveDimensions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(1, 2, 3, 2, 2).sum().reshape(1)


class Integers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(dim=1).float()


def test_what_a_phone_cannot_take_is_seen():
    example = torch.zeros(2, 3, 4)
    assert any("5 dim" in p for p in problems(torch.export.export(FiveDimensions(), (example,))))
    assert any("int64" in p for p in problems(torch.export.export(Integers(), (example,))))
    free = {"x": {0: torch.export.Dim("batch")}}
    dynamic = torch.export.export(Integers(), (example,), dynamic_shapes=free)
    assert any("dynamic" in p for p in problems(dynamic))


def test_no_operation_that_mobile_runtimes_lack(case):
    """FINDINGS: NaN guards of an exported SDPA split graphs, and aliases Core ML refuses."""
    captured, _ = case
    targets = {str(node.target) for node in captured.program.graph.nodes}
    bad = ("isnan", "where", "scaled_dot", "alias", "erf", "einsum", "cumprod", "index_put")
    assert not [target for target in targets if any(word in target for word in bad)]


# --- values --------------------------------------------------------------------------------------


def test_the_program_equals_eager(case, random_pixels):
    captured, deploy = case
    plain, debug = captured.program.module(), captured.debug_program.module()
    for seed in range(3):
        pixels = random_pixels(seed, deploy.image_size)
        wanted = deploy(*pixels)
        with torch.no_grad():
            found, tapped = plain(*pixels), debug(*pixels)
        assert len(found) == len(deploy.output_names)
        assert len(tapped) == len(wanted)
        for one, two, value in zip(found, tapped, wanted, strict=False):
            assert torch.equal(one, two)
            # Attention is written out when exporting: other rounding, 1e-6 of some ten mm.
            torch.testing.assert_close(one, value, rtol=0, atol=2e-5)
        for one, value in zip(tapped[len(found) :], wanted[len(found) :], strict=True):
            torch.testing.assert_close(one, value, rtol=1e-5, atol=1e-4)


def test_tap_nodes_hold_the_values_of_eager(case, random_pixels):
    """Read in the graph that ships, which does not give them out."""
    captured, deploy = case
    assert list(captured.tap_nodes) == deploy.tap_names
    pixels = random_pixels(4, deploy.image_size)
    values = run_nodes(captured.program, pixels)
    _, taps = deploy.run(pixels)
    for tap, node in captured.tap_nodes.items():
        torch.testing.assert_close(values[node], taps[tap], rtol=1e-5, atol=1e-4)
    # Different taps are different nodes of different values, so none could stand for another.
    assert len(set(captured.tap_nodes.values())) == len(captured.tap_nodes)
    found = [values[node] for node in captured.tap_nodes.values()]
    for index, one in enumerate(found):
        for two in found[index + 1 :]:
            assert one.shape != two.shape or float((one - two).abs().max()) > 1e-2


def test_tap_nodes_stand_in_the_order_of_the_graph(case):
    captured, _ = case
    order = [node.name for node in captured.program.graph.nodes]
    places = [order.index(node) for node in captured.tap_nodes.values()]
    assert places == sorted(places)


def described(program: ExportedProgram) -> list[tuple]:
    return [
        (node.name, node.op, str(node.target), str(node.args), str(node.kwargs))
        for node in program.graph.nodes
        if node.op != "output"
    ]


def test_taps_add_outputs_and_no_node(case):
    captured, _ = case
    assert described(captured.program) == described(captured.debug_program)
    plain = captured.program.graph_signature.user_outputs
    assert captured.debug_program.graph_signature.user_outputs == (
        *plain,
        *captured.tap_nodes.values(),
    )
    for name, weight in captured.program.state_dict.items():
        assert torch.equal(captured.debug_program.state_dict[name], weight)


def test_decode_nodes_are_those_behind_the_logits(case, random_pixels):
    """The logits are found by their value, what follows by the edges of the graph."""
    captured, deploy = case
    seen: list[Tensor] = []
    hook = deploy.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pixels = random_pixels(9, deploy.image_size)
    deploy(*pixels)
    hook.remove()
    values = run_nodes(captured.program, pixels)
    equal = [
        node
        for node in captured.program.graph.nodes
        if isinstance(values[node.name], Tensor)
        and values[node.name].shape == seen[0].shape
        and values[node.name].is_floating_point()
        and torch.allclose(values[node.name], seen[0], rtol=1e-4, atol=1e-4)
    ]
    logits = equal[0]
    behind: set[str] = set()
    waiting = list(logits.users)
    while waiting:
        node = waiting.pop()
        if node.op == "call_function" and node.name not in behind:
            behind.add(node.name)
            waiting += list(node.users)
    assert behind == captured.decode_nodes
    assert len(behind) > 3
    assert set(captured.program.graph_signature.user_outputs) <= behind
    assert not behind & set(captured.tap_nodes.values())
    assert logits.name not in behind


def test_half_precision_is_in_the_weights(random_model):
    model = random_model(**VARIANTS["linear-scalar"])
    exact, rounded = capture(model).program, capture(model, "fp16").program
    assert described(exact) != described(rounded), "epsilon is rounded too"
    for name, weight in exact.state_dict.items():
        found = rounded.state_dict[name].numpy()
        if not name.startswith("decoder"):
            weight = weight.half().float()
        np.testing.assert_array_equal(found, weight.numpy())


# --- slices that take everything -----------------------------------------------------------------


class Whole(nn.Module):
    """Slices that take everything, inside and at the output."""

    image_size = (4, 6)
    input_names = ("one",)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x[:, :, :4] * 2
        z = (y[..., :6] + 1)[..., :6]
        return z.sum(dim=(1, 2, 3)), y[:, :3]


def count_aliases(program: ExportedProgram) -> int:
    return sum(node.target == torch.ops.aten.alias.default for node in program.graph.nodes)


def test_aliases_inside_the_graph_are_removed():
    example = torch.arange(72.0).reshape(1, 3, 4, 6)
    raw = torch.export.export(Whole(), (example,)).run_decompositions({})
    program = export(Whole())
    assert count_aliases(raw) >= 3, "nothing to remove: the test shows nothing"
    # One is an output itself, and its name is the output's.
    assert count_aliases(program) == 1
    assert program.graph_signature.user_outputs == raw.graph_signature.user_outputs
    program.graph.lint()
    for found, wanted in zip(program.module()(example), Whole()(example), strict=True):
        assert torch.equal(found, wanted)


# --- planted faults ------------------------------------------------------------------------------


class OneMore(DeployModel):
    """An operation more where the taps are outputs."""

    def run(self, pixels):
        outputs, taps = super().run(pixels)
        return outputs, {name: value * 1.0 if self.debug else value for name, value in taps.items()}


class OneLess(DeployModel):
    """The taps are not those that are named."""

    @property
    def tap_names(self) -> list[str]:
        return super().tap_names[:-1]

    def forward(self, *pixels):
        outputs = super().forward(*pixels)
        return (*outputs, torch.zeros(1)) if self.debug else outputs


@pytest.mark.parametrize("fault", [OneMore, OneLess])
def test_graphs_that_differ_are_refused(random_model, fault: Callable):
    model = random_model(**VARIANTS["linear-scalar"])
    with pytest.raises(BuildError, match="the graph with taps differs") as caught:
        capture_deploy(apply_passes(fault(model), PASSES), parse_recipe("fp32"), {})
    assert "\n" not in str(caught.value)


class Flat(nn.Module):
    """Gives the first logits as they are."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def forward(self, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: logits.flatten(1)[:, i] for i, name in enumerate(self.names)}


def test_a_graph_without_decoder_is_refused(random_model):
    """Nothing would stay in float32, and no one would know."""
    deploy = DeployModel(random_model(**VARIANTS["linear-scalar"]))
    decoder = deploy.decoder
    deploy.decoder = Flat(deploy.output_names)
    program = export(deploy)
    names = _downstream(program, decoder)
    assert names, "the module at its place counts, whatever it is"

    class Inline(DeployModel):
        def run(self, pixels):
            self.backbone.record.clear()
            pooled = self.pool(self.pool.extract(self.backbone, torch.cat(pixels)))
            self.backbone.record.clear()
            return {name: pooled[:1, i] for i, name in enumerate(self.output_names)}, {}

    with pytest.raises(BuildError, match="no node of the decoder"):
        _downstream(export(Inline(random_model(**VARIANTS["linear-scalar"]))), decoder)
