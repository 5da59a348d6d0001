"""How fast the machine is at the model's matrix products, and at nothing else.

The products of every block, plain float32, as one chain in onnxruntime. What is left out is
softmax, norms, GELU, sums and every change of layout, so no float32 form that computes all tokens
of all blocks can pass it on these kernels.
"""

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

SEED = 7


class ViTShape(msgspec.Struct, frozen=True, kw_only=True):
    """What the sizes of the products follow from."""

    width: int
    depth: int
    heads: int
    hidden: int
    patch: int
    channels: int = 3

    def patches(self, size: int) -> int:
        """Patches of a square image of ``size`` pixels."""
        return (size // self.patch) ** 2


class Product(msgspec.Struct, frozen=True):
    """``count`` products of (rows, inner) by (inner, columns)."""

    name: str
    count: int
    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        """Two for each multiplication with its addition."""
        return 2 * self.count * self.rows * self.inner * self.columns


def products(shape: ViTShape, size: int) -> tuple[Product, ...]:
    """Return all matrix products of a ViT at one image size, without its head."""
    patches, width = shape.patches(size), shape.width
    tokens, depth = 1 + patches, shape.depth
    head = width // shape.heads
    pixels = shape.channels * shape.patch**2
    return (
        Product("patch embedding", 1, patches, pixels, width),
        Product("q, k, v", 3 * depth, tokens, width, width),
        Product("attention", depth * shape.heads, tokens, head, tokens),
        Product("attention × v", depth * shape.heads, tokens, tokens, head),
        Product("projection", depth, tokens, width, width),
        Product("fc1", depth, tokens, width, shape.hidden),
        Product("fc2", depth, tokens, shape.hidden, width),
    )


def count_flops(shape: ViTShape, size: int) -> int:
    """Floating-point operations of all matrix products of one image."""
    return sum(product.flops for product in products(shape, size))


def gemm_model(shape: ViTShape, size: int) -> "ModelProto":
    """Return the products as an ONNX model: (1, 3, S, S) float32 → (T, width), of no meaning.

    Between the products stand reshapes alone, which move nothing.
    """
    from onnx import TensorProto, helper

    chain = _Chain()
    patches, width, head = shape.patches(size), shape.width, shape.width // shape.heads
    tokens, pixels = 1 + patches, shape.channels * shape.patch**2
    side = size // shape.patch * shape.patch
    # An image whose sides are no multiple of the patch has pixels that no patch reads.
    if side != size:
        raise ValueError(f"{size} is not a multiple of the patch size {shape.patch}")
    image = chain.reshape("image", (patches, pixels))
    embedded = chain.matmul(image, chain.weight((pixels, width)))
    x = chain.concat(chain.weight((1, width)), embedded)
    for _ in range(shape.depth):
        q, k, v = (chain.matmul(x, chain.weight((width, width))) for _ in range(3))
        q = chain.reshape(q, (shape.heads, tokens, head))
        k = chain.reshape(k, (shape.heads, head, tokens))
        v = chain.reshape(v, (shape.heads, tokens, head))
        # Unlike after a softmax, values grow with the tokens; the projection takes that back.
        attended = chain.matmul(chain.matmul(q, k), v)
        attended = chain.reshape(attended, (tokens, width))
        x = chain.matmul(attended, chain.weight((width, width), shrink=(head * tokens) ** 0.5))
        x = chain.matmul(x, chain.weight((width, shape.hidden)))
        x = chain.matmul(x, chain.weight((shape.hidden, width)))
    graph = helper.make_graph(
        chain.nodes,
        "products",
        [
            helper.make_tensor_value_info(
                "image", TensorProto.FLOAT, (1, shape.channels, size, size)
            )
        ],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, (tokens, width))],
        chain.initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


class _Chain:
    """Nodes and weights of a model that is being written."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._rng = np.random.default_rng(SEED)

    def weight(self, shape: tuple[int, int], shrink: float = 1.0) -> str:
        """A random matrix that keeps the spread of what it multiplies."""
        scale = 1 / (shrink * shape[0] ** 0.5)
        return self._constant(scale * self._rng.standard_normal(shape, np.float32))

    def matmul(self, a: str, b: str) -> str:
        """One product."""
        return self._node("MatMul", a, b)

    def concat(self, a: str, b: str) -> str:
        """``a`` above ``b``."""
        return self._node("Concat", a, b, axis=0)

    def reshape(self, value: str, shape: tuple[int, ...]) -> str:
        """The same memory in another shape."""
        return self._node("Reshape", value, self._constant(np.array(shape, np.int64)))

    def _node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        from onnx import helper

        name = f"value_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def _constant(self, value: np.ndarray) -> str:
        from onnx import numpy_helper

        name = f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(value, name))
        return name
