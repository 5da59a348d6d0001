"""Attention as onnxruntime's own operator, against the products that it replaces."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from dinoexport.targets.onnx.attention import DOMAIN, fuse_attention_
from dinoexport.targets.onnx.lower import OPSET

HEADS, TOKENS, WIDTH = 3, 10, 24
# Fewer queries than keys, as the last block has them, and other widths of a head than tokens.
QUERIES = 4


def written_out(**changes) -> ModelProto:
    """Attention of three heads in plain products, as it is captured; ``changes`` break it."""
    facts = {"last_order": [0, 2, 1, 3], "show_map": False} | changes
    shape = {"q": QUERIES, "k": TOKENS, "v": TOKENS}
    orders = {"q": [0, 2, 1, 3], "k": [0, 2, 3, 1], "v": [0, 2, 1, 3]}
    nodes, constants = [], []
    for name, count in shape.items():
        sides = np.array([1, count, HEADS, WIDTH // HEADS], np.int64)
        constants.append(numpy_helper.from_array(sides, f"{name}_sides"))
        nodes.append(helper.make_node("Reshape", [name, f"{name}_sides"], [f"{name}_parts"]))
        nodes.append(
            helper.make_node("Transpose", [f"{name}_parts"], [f"{name}_heads"], perm=orders[name])
        )
    constants.append(numpy_helper.from_array(np.array([1, QUERIES, WIDTH], np.int64), "sides"))
    nodes += [
        helper.make_node("MatMul", ["q_heads", "k_heads"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["map"], axis=-1),
        helper.make_node("MatMul", ["map", "v_heads"], ["mixed"]),
        helper.make_node("Transpose", ["mixed"], ["mixed_rows"], perm=facts["last_order"]),
        helper.make_node("Reshape", ["mixed_rows", "sides"], ["attended"]),
        helper.make_node("Neg", ["attended"], ["y"]),
    ]
    inputs = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, count, WIDTH])
        for n, count in shape.items()
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, QUERIES, WIDTH])]
    if facts["show_map"]:
        sides = [1, HEADS, QUERIES, TOKENS]
        outputs.append(helper.make_tensor_value_info("map", TensorProto.FLOAT, sides))
    graph = helper.make_graph(nodes, "attention", inputs, outputs, constants)
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def run(model: ModelProto) -> np.ndarray:
    rng = np.random.default_rng(8)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    # Wide enough that a forgotten or added scale changes the map.
    feeds = {i.name: rng.normal(size=i.shape).astype(np.float32) for i in session.get_inputs()}
    return np.asarray(session.run(["y"], feeds)[0])


def test_the_operator_gives_what_the_products_do():
    model = written_out()
    wanted = run(model)
    assert fuse_attention_(model, least_tokens=TOKENS) == 1
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds == {"MultiHeadAttention": 1, "Neg": 1}
    assert model.graph.node[0].domain == DOMAIN
    onnx.checker.check_model(model, full_check=True)
    # Nothing is left that is not read, and every value has a shape.
    assert not model.graph.initializer
    assert "attended" in {value.name for value in model.graph.value_info}
    # Sums in another order.
    np.testing.assert_allclose(run(model), wanted, rtol=1e-4, atol=1e-6)


def test_another_number_of_heads_or_scale_is_seen():
    model = written_out()
    wanted = run(model)
    fuse_attention_(model, least_tokens=TOKENS)
    for name, value in (("num_heads", 1), ("scale", WIDTH**-0.5)):
        wrong = ModelProto()
        wrong.CopyFrom(model)
        node = wrong.graph.node[0]
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])
        assert not np.allclose(run(wrong), wanted, rtol=1e-2, atol=1e-2)


def test_few_tokens_stay_as_they_are():
    model = written_out()
    before = model.SerializeToString()
    assert fuse_attention_(model, least_tokens=TOKENS + 1) == 0
    assert model.SerializeToString() == before


@pytest.mark.parametrize(
    "changes",
    [{"show_map": True}, {"last_order": [0, 1, 2, 3]}],
    ids=["map-is-an-output", "other-order"],
)
def test_what_is_no_plain_attention_stays(changes):
    assert fuse_attention_(written_out(**changes), least_tokens=1) == 0
