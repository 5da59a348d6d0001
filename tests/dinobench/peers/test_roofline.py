"""Counting of matrix products, against a plain walk and against the file that is timed."""

import numpy as np
import pytest

from dinobench.peers.roofline import ViTShape, count_flops, gemm_model, integer_model

TINY = ViTShape(width=8, depth=2, heads=2, hidden=32, patch=2)
SMALL = ViTShape(width=384, depth=12, heads=6, hidden=1536, patch=14)


def walk(shape: ViTShape, size: int) -> int:
    """Two for every multiplication, one output value after the other."""
    patches = (size // shape.patch) * (size // shape.patch)
    tokens, total = patches + 1, 0
    for _ in range(patches):
        for _ in range(shape.width):
            total += 2 * 3 * shape.patch * shape.patch
    for _ in range(shape.depth):
        for _ in range(tokens):
            total += 4 * 2 * shape.width * shape.width  # q, k, v, projection
            total += 2 * 2 * shape.width * shape.hidden
            for _ in range(tokens):
                total += 2 * 2 * shape.width  # all heads' scores and weighted sums
    return total


@pytest.mark.parametrize("size", [4, 10])
def test_flops_are_those_of_a_plain_walk(size) -> None:
    assert count_flops(TINY, size) == walk(TINY, size)


def test_flops_of_vit_s_are_the_known_ones() -> None:
    assert count_flops(SMALL, 224) / 1e9 == pytest.approx(12.2, abs=0.05)
    assert count_flops(SMALL, 518) / 1e9 == pytest.approx(93.4, abs=0.05)


@pytest.mark.parametrize("make", [gemm_model, integer_model])
def test_model_holds_exactly_these_products_and_its_numbers_stay_finite(make, tmp_path) -> None:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = make(TINY, 10)
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    shapes = {i.name: tuple(i.dims) for i in inferred.graph.initializer}
    shapes |= {
        v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim)
        for v in (*inferred.graph.value_info, *inferred.graph.output)
    }
    flops = sum(
        2 * int(np.prod(shapes[node.input[0]])) * shapes[node.input[1]][-1]
        for node in inferred.graph.node
        if node.op_type in ("MatMul", "MatMulInteger")
    )
    assert flops == count_flops(TINY, 10)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "run.onnx")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    # Nothing is folded or computed once for several.
    run = onnx.load(tmp_path / "run.onnx")
    assert sum("MatMul" in n.op_type or n.op_type == "Gemm" for n in run.graph.node) == sum(
        "MatMul" in n.op_type for n in model.graph.node
    )
    image = np.random.default_rng(0).standard_normal((1, 3, 10, 10), np.float32)
    (found,) = session.run(None, {"image": image})
    # Neither overflow nor numbers so small that the processor would slow down.
    assert np.isfinite(found).all() and 1e-6 < np.abs(found).mean() < 1e6


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of the patch size"):
        gemm_model(TINY, 11)
