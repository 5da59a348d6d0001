"""Attention in plain products → onnxruntime's own operator, which holds no map of all tokens by all
tokens in memory.

    Before:  q, k, v → Reshape → Transpose → MatMul → Softmax → MatMul → Transpose → Reshape
    After:   q, k, v → com.microsoft.MultiHeadAttention
"""

from collections import Counter
from dataclasses import dataclass

import onnx
from onnx import ModelProto, NodeProto

from dinoexport.targets.onnx.draft import replace_nodes_

DOMAIN = "com.microsoft"

LEAST_TOKENS = 1024
"""From which on it is faster: 13 % off an int8 ViT-S at 1,370 tokens and 9 % at 1,025, nothing at
577 and 257, where a map fits into a core's cache (one thread, host)."""

_HEADS_FIRST = [0, 2, 1, 3]
_CHANNELS_FIRST = [0, 2, 3, 1]


@dataclass(frozen=True)
class _Attention:
    """What is replaced: all its nodes, the last of them, and what the operator reads."""

    nodes: tuple[NodeProto, ...]
    inputs: tuple[str, str, str]
    heads: int

    @property
    def output(self) -> str:
        return self.nodes[-1].output[0]


def fuse_attention_(model: ModelProto, least_tokens: int) -> int:
    """Replace attention to that many tokens wherever it is written out, in place.

    Returns:
        How often it was.
    """
    found = [
        attention
        for node in model.graph.node
        if node.op_type == "Softmax"
        and (attention := _match(model, node, least_tokens)) is not None
    ]
    if not found:
        return 0
    fused = {attention.output: _operator(attention) for attention in found}
    inside = {node.output[0] for attention in found for node in attention.nodes}
    nodes = [
        fused.get(node.output[0], node)
        for node in model.graph.node
        if node.output[0] in fused or node.output[0] not in inside
    ]
    model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    replace_nodes_(model, nodes)
    read = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    kept = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return len(found)


def _operator(attention: _Attention) -> NodeProto:
    return onnx.helper.make_node(
        "MultiHeadAttention",
        attention.inputs,
        [attention.output],
        f"node_{attention.output}",
        domain=DOMAIN,
        num_heads=attention.heads,
        # The weights of q hold it already.
        scale=1.0,
    )


def _match(model: ModelProto, softmax: NodeProto, least_tokens: int) -> _Attention | None:
    """Return the attention around a softmax; None where it is another one, or a small one."""
    makers = {name: node for node in model.graph.node for name in node.output}
    readers = Counter(name for node in model.graph.node for name in node.input)
    readers.update(value.name for value in model.graph.output)

    def made(node: NodeProto | None, place: int, kind: str) -> NodeProto | None:
        maker = makers.get(node.input[place]) if node is not None else None
        return maker if maker is not None and maker.op_type == kind else None

    def reader(node: NodeProto | None, kind: str) -> NodeProto | None:
        name = node.output[0] if node is not None else ""
        return next((n for n in model.graph.node if n.op_type == kind and name in n.input), None)

    scores = made(softmax, 0, "MatMul")
    mixed = reader(softmax, "MatMul")
    turned = [
        made(scores, 0, "Transpose"),
        made(scores, 1, "Transpose"),
        made(mixed, 1, "Transpose"),
    ]
    parts = [made(node, 0, "Reshape") for node in turned]
    back = reader(mixed, "Transpose")
    last = reader(back, "Reshape")
    nodes = [*parts, *turned, scores, softmax, mixed, back, last]
    if any(node is None for node in nodes):
        return None
    whole = tuple(node for node in nodes if node is not None)
    orders = [_order(node) for node in whole if node.op_type == "Transpose"]
    if orders != [_HEADS_FIRST, _CHANNELS_FIRST, _HEADS_FIRST, _HEADS_FIRST]:
        return None
    if any(readers[node.output[0]] != 1 for node in whole[:-1]):
        return None
    shapes = {v.name: v.type.tensor_type.shape.dim for v in model.graph.value_info}
    _, heads, _, tokens = (side.dim_value for side in shapes[softmax.output[0]])
    if tokens < least_tokens:
        return None
    inputs = (whole[0].input[0], whole[1].input[0], whole[2].input[0])
    return _Attention(whole, inputs, heads)


def _order(node: NodeProto) -> list[int]:
    return next((list(a.ints) for a in node.attribute if a.name == "perm"), [])
