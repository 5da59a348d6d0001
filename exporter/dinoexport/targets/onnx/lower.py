"""Captured program → ONNX model, checked with full shape inference."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx
import torch
from onnx import ModelProto, NodeProto
from torch.export import ExportedProgram

from dinoexport.errors import BuildError
from dinoexport.graph.capture import CapturedProgram
from dinoexport.targets.adaptor import NhwcAdaptor
from dinoexport.targets.onnx.large import check, write

OPSET = 20
"""The first opset with a Gelu operator; 18 was measured 7 % slower (it spells GELU out)."""

_CHECKS = (torch.ops.aten._assert_tensor_metadata.default,)
"""Nodes that compute nothing, which each export adds where it likes."""


def lower(program: CapturedProgram) -> ModelProto:
    """Convert the captured program behind a uint8 NHWC adaptor.

    Values have the names of the captured nodes that they come from.

    Raises:
        BuildError: the exporter cannot express an operation.
    """
    adaptor = NhwcAdaptor(program.program, program.input_names, program.output_names)
    with torch.no_grad():
        whole = torch.export.export(adaptor, (), kwargs=program.sample_inputs())
        # As the captured program was, so that casts are spelled alike.
        whole = whole.run_decompositions({})
    names = _captured_names(program, whole)
    try:
        exported = torch.onnx.export(
            whole,
            (),
            kwargs=program.sample_inputs(),
            dynamo=True,
            input_names=list(program.input_names),
            output_names=list(program.output_names),
            opset_version=OPSET,
            optimize=True,
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise BuildError(f"onnx: the exporter failed: {reason}") from error
    if exported is None:
        raise BuildError("onnx: the exporter returned nothing")
    model = exported.model_proto
    _strip_traces_(model)
    _rename_values_(model, names)
    return model


def _captured_names(program: CapturedProgram, whole: ExportedProgram) -> dict[str, str]:
    """Return {node behind the adaptor: node of the captured program}, where these differ.

    The adaptor's own cast and transposition come first and take names of their kind, such as
    ``_to_copy``; each later node of that kind is counted on from there.

    Raises:
        BuildError: the captured program is not what follows the adaptor.
    """
    inner, outer = (
        [n for n in p.graph.nodes if n.op == "call_function" and n.target not in _CHECKS]
        for p in (program.program, whole)
    )
    first = len(outer) - len(inner)
    if first < 0 or [n.target for n in outer[first:]] != [n.target for n in inner]:
        raise BuildError(
            "onnx: the graph behind the adaptor is not the captured one, so its values cannot be "
            "named. Please report the checkpoint's configuration."
        )
    names = {node.name: f"adaptor_{node.name}" for node in outer[:first]}
    names |= {a.name: b.name for a, b in zip(outer[first:], inner, strict=True)}
    return {old: new for old, new in names.items() if old != new}


def _rename_values_(model: ModelProto, names: Mapping[str, str]) -> None:
    """Rename values in place; inputs, outputs and weights keep their names."""
    for node in model.graph.node:
        for places in (node.input, node.output):
            places[:] = [names.get(name, name) for name in places]
    for value in model.graph.value_info:
        value.name = names.get(value.name, value.name)


def _strip_traces_(model: ModelProto) -> None:
    """Drop stack traces and source paths that the exporter leaves in nodes and values."""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]
        value.doc_string = ""
    for initializer in model.graph.initializer:
        del initializer.metadata_props[:]
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    model.graph.doc_string = model.doc_string = ""


def locate_taps(model: ModelProto, tap_nodes: Mapping[str, str]) -> dict[str, str]:
    """Check that each tap's node is a value of the model: the exporter keeps node names.

    Raises:
        BuildError: a tap was optimised away.
    """
    known = set(produced_values(model.graph.node))
    for tap, node in tap_nodes.items():
        if node not in known:
            raise BuildError(f"onnx: tap {tap} (node {node}) is not in the exported graph")
    return dict(tap_nodes)


def produced_values(nodes: Iterable[NodeProto]) -> list[str]:
    """Names of all values that nodes produce."""
    return [name for node in nodes for name in node.output]


def save(model: ModelProto, path: Path, metadata: Mapping[str, str]) -> None:
    """Embed metadata, check, and write; above 2 GB with the weights in a file beside it.

    Raises:
        BuildError: the checker or shape inference refuses the model.
    """
    onnx.helper.set_model_props(model, dict(sorted(metadata.items())))
    model.producer_name, model.producer_version = "dinoexport", ""
    check(model)
    write(model, path)
