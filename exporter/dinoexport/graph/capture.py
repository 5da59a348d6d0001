"""Capture a deploy model once: the ExportedProgram that every target lowers.

It is captured twice, with and without its taps as outputs, and the two graphs are shown to have
the same nodes; so a tap's node is known by name in the graph that ships.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.export import ExportedProgram

from dinoexport.errors import BuildError
from dinoexport.graph.deploy_model import DeployModel, round_weights_
from dinoexport.passes.base import Pass
from dinoexport.passes.sequence import PASSES, build_deploy_model
from dinotrain.model import TaskModel


@dataclass(frozen=True)
class CapturedProgram:
    """One captured model: float32 pixels (1, 3, H, W) of 0..255 per input, (1,) per output.

    ``debug_program`` is the same graph with the taps as further outputs; ``tap_nodes`` names the
    node of each tap, in the order of the graph; ``decode_nodes`` are those that come after the
    logits and stay in float32.
    """

    program: ExportedProgram
    debug_program: ExportedProgram
    image_size: tuple[int, int]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    tap_nodes: dict[str, str]
    decode_nodes: frozenset[str]

    def sample_inputs(self) -> dict[str, torch.Tensor]:
        """Black uint8 images, {input: (1, H, W, 3)}: the shapes that adaptors are traced with."""
        shape = (1, *self.image_size, 3)
        return {name: torch.zeros(shape, dtype=torch.uint8) for name in self.input_names}


def capture(
    model: TaskModel, precision: str = "fp32", passes: Sequence[Pass] = PASSES
) -> CapturedProgram:
    """Capture the deploy graph of a trained model, its weights rounded to a precision.

    Rounding happens here and not in the targets, so that every target of a precision ships the
    same numbers, whichever of them it stores in how many bits.

    Raises:
        BuildError: the graph with taps differs from the graph without.
        PassError: a pass cannot be applied.
    """
    plain = round_weights_(build_deploy_model(model, passes), precision)
    debug = round_weights_(build_deploy_model(model, passes, debug=True), precision)
    return capture_deploy(plain, debug)


def capture_deploy(plain: DeployModel, debug: DeployModel) -> CapturedProgram:
    """Capture two deploy models of the same weights; see ``capture``."""
    program, debug_program = _export(plain), _export(debug)
    nodes = [node.name for node in program.graph.nodes]
    if nodes != [node.name for node in debug_program.graph.nodes]:
        raise BuildError(
            "capture: the graph with taps differs from the graph without, so taps cannot be "
            "located. Please report the checkpoint's configuration."
        )
    outputs = [spec.arg.name for spec in debug_program.graph_signature.output_specs]
    taps = dict(zip(debug.tap_names, outputs[len(plain.output_names) :], strict=True))
    return CapturedProgram(
        program=program,
        debug_program=debug_program,
        image_size=plain.image_size,
        input_names=tuple(plain.input_names),
        output_names=tuple(plain.output_names),
        tap_nodes=taps,
        decode_nodes=frozenset(_downstream(program, plain.decoder)),
    )


def _export(model: nn.Module) -> ExportedProgram:
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
