"""Capture a deploy model once: the ExportedProgram that every target lowers.

It is captured twice, with and without its taps as outputs, and the two graphs are shown to have
the same nodes; so a tap's node is known by name in the graph that ships.
"""

import dataclasses
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.export import ExportedProgram

from dinoexport.errors import BuildError
from dinoexport.graph.deploy_model import DeployModel
from dinoexport.passes.base import Pass
from dinoexport.passes.sequence import PASSES, build_deploy_model
from dinoexport.quantize.layers import Layer, layer_name
from dinoexport.quantize.prepare import prepare_
from dinoexport.recipes import Recipe, parse_recipe
from dinotrain.model import TaskModel

_WEIGHTED = (
    torch.ops.aten.linear.default,
    torch.ops.aten.conv2d.default,
    torch.ops.aten.convolution.default,
)


@dataclass(frozen=True)
class CapturedProgram:
    """One captured model: float32 pixels (1, 3, H, W) of 0..255 per input, (1,) per output.

    ``debug_program`` is the same graph with the taps as further outputs; ``tap_nodes`` names the
    node of each tap, in the order of the graph, or nothing where nobody will look at them.
    ``decode_nodes`` are those that come after the logits and stay in float32. ``layers`` are those
    of ``recipe``, by name, with their nodes.
    """

    program: ExportedProgram
    debug_program: ExportedProgram
    image_size: tuple[int, int]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    tap_nodes: dict[str, str]
    decode_nodes: frozenset[str]
    recipe: Recipe
    layers: dict[str, Layer]
    pages: mmap.mmap | None = None
    """Of the file that holds the weights, see ``spill_``."""

    @property
    def weight_bytes(self) -> int:
        """Of its weights in float32, as it holds them and converters write them."""
        return sum(t.numel() * t.element_size() for t in self.program.state_dict.values())

    def rest(self) -> None:
        """Take weights that lie in a file out of memory; they come back when they are read."""
        if self.pages is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.pages.madvise(mmap.MADV_DONTNEED)

    def sample_inputs(self) -> dict[str, torch.Tensor]:
        """Black uint8 images, {input: (1, H, W, 3)}: the shapes that adaptors are traced with."""
        shape = (1, *self.image_size, 3)
        return {name: torch.zeros(shape, dtype=torch.uint8) for name in self.input_names}


def capture(
    model: TaskModel, recipe: str = "fp32", passes: Sequence[Pass] = PASSES
) -> CapturedProgram:
    """Capture the deploy graph of a trained model with the numbers of a recipe, by its name.

    Raises:
        UsageError: no such recipe, or it names a layer that is not there.
        BuildError: the recipe wants calibration, or the graph with taps differs from the one
            without.
        PassError: a pass cannot be applied.
    """
    parsed = parse_recipe(recipe)
    deploy = build_deploy_model(model, passes)
    return capture_deploy(deploy, parsed, prepare_(deploy, parsed))


def capture_deploy(
    deploy: DeployModel, recipe: Recipe, layers: Mapping[str, Layer]
) -> CapturedProgram:
    """Capture a prepared deploy model.

    Args:
        deploy: see ``prepare_``, which gave ``layers``.
        recipe: that it was prepared for.
        layers: by name; here their nodes are added.

    Raises:
        BuildError: the graph with taps differs from the graph without.
    """
    program = export(deploy)
    deploy.debug = True
    debug_program = export(deploy)
    deploy.debug = False
    nodes = [node.name for node in program.graph.nodes]
    if nodes != [node.name for node in debug_program.graph.nodes]:
        raise BuildError(
            "capture: the graph with taps differs from the graph without, so taps cannot be "
            "located. Please report the checkpoint's configuration."
        )
    outputs = [spec.arg.name for spec in debug_program.graph_signature.output_specs]
    taps = dict(zip(deploy.tap_names, outputs[len(deploy.output_names) :], strict=True))
    return CapturedProgram(
        program=program,
        debug_program=debug_program,
        image_size=deploy.image_size,
        input_names=tuple(deploy.input_names),
        output_names=tuple(deploy.output_names),
        tap_nodes=taps,
        decode_nodes=frozenset(_downstream(program, deploy.decoder)),
        recipe=recipe,
        layers=_place(program, layers),
    )


@torch.no_grad()
def recapture_(
    program: CapturedProgram, deploy: DeployModel, recipe: Recipe, layers: Mapping[str, Layer]
) -> CapturedProgram:
    """Return what ``capture_deploy`` would give, by changing the weights of a captured program.

    Args:
        program: of the same deploy model, prepared for a recipe without modifiers; loses its
            weights.
        deploy: prepared for another one without modifiers, both or none of them based on fp32.
        recipe: that it was prepared for.
        layers: by name.

    Raises:
        BuildError: the model has other weights than the program.
    """
    weights = deploy.state_dict()
    for captured in (program.program, program.debug_program):
        for name, value in captured.state_dict.items():
            if name not in weights or weights[name].shape != value.shape:
                raise BuildError(f"capture: {name} of the captured program is not in the model")
            value.copy_(weights[name])
    return dataclasses.replace(program, recipe=recipe, layers=_place(program.program, layers))


def _place(program: ExportedProgram, layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """Return the layers that the graph holds, with the node and the weight of each.

    A layer that runs more than once, on several pictures, has the node of its first run.
    """
    parameters = program.graph_signature.inputs_to_parameters
    placed = {}
    for node in program.graph.nodes:
        if node.target not in _WEIGHTED:
            continue
        weight = parameters.get(node.args[1].name, "")
        layer = layers.get(layer_name(weight.removesuffix(".weight")))
        if layer is not None and layer.name not in placed:
            placed[layer.name] = dataclasses.replace(layer, node=node.name, weight=weight)
    return placed


def export(model: nn.Module) -> ExportedProgram:
    """Capture a deploy model as it stands, without slices that take everything."""
    image = torch.zeros(1, 3, *model.image_size)  # type: ignore[misc]
    arguments = tuple(image.clone() for _ in model.input_names)  # type: ignore[union-attr]
    with torch.no_grad():
        program = torch.export.export(model, arguments).run_decompositions({})
    _drop_aliases_(program)
    return program


def _drop_aliases_(program: ExportedProgram) -> None:
    """Remove slices that take everything, which Core ML's converter refuses: x → alias → y."""
    graph = program.graph
    for node in list(graph.nodes):
        if (
            node.target == torch.ops.aten.alias.default
            and program.graph.output_node() not in node.users
        ):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    program.graph_module.recompile()


def _downstream(program: ExportedProgram, decoder: nn.Module) -> list[str]:
    """Names of the decoder's nodes and of everything that reads them."""
    names: set[str] = set()
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        stack = node.meta.get("nn_module_stack") or {}
        inside = any(path.split(".")[-1] == "decoder" for path, _ in stack.values())
        if inside or any(parent.name in names for parent in node.all_input_nodes):
            names.add(node.name)
    if not names:
        raise BuildError("capture: no node of the decoder is in the graph")
    return sorted(names)
