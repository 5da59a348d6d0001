"""Nodes and constants that are written in place of others in an ONNX graph."""

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from dinoexport.targets.onnx.large import infer_types


class Draft:
    """What a rewriting adds to a graph, in running order."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def constant(self, name: str, value: ArrayLike) -> str:
        """Add an initializer of the value's own type, and return its name."""
        array = np.asarray(value, order="C")
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def node(self, kind: str, inputs: Sequence[str], outputs: str | Sequence[str], **facts) -> str:
        """Add a node, named after its first output, and return that output's name."""
        names = [outputs] if isinstance(outputs, str) else list(outputs)
        self.nodes.append(onnx.helper.make_node(kind, inputs, names, f"node_{names[0]}", **facts))
        return names[0]

    def cast(self, source: str, kind: int, output: str) -> str:
        """Add a cast to one of TensorProto's types, and return its output's name."""
        return self.node("Cast", [source], output, to=kind)


def replace_nodes_(model: ModelProto, nodes: Sequence[NodeProto]) -> None:
    """Give a model other nodes, in running order, and infer the types of all values anew."""
    copies = []
    for node in nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        copies.append(copy)
    del model.graph.node[:]
    model.graph.node.extend(copies)
    # Stale types; shape inference writes them anew, but for operators that it does not know.
    foreign = {name for node in copies if node.domain for name in node.output}
    known = [value for value in model.graph.value_info if value.name in foreign]
    kept = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in known]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    inferred = infer_types(model)
    del model.graph.value_info[:]
    model.graph.value_info.extend(inferred)
