"""How fast the machine is at the model's matrix products, and at nothing else.

The products of every block in onnxruntime, in float32 and as int8 recipes have them. What is left
out is softmax, norms, GELU, sums and every change of layout, so no form that computes all tokens of
all blocks can pass them on these kernels.
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
    return chain.model((1, shape.channels, size, size), x, (tokens, width))


def integer_model(shape: ViTShape, size: int) -> "ModelProto":
    """Return the products as an int8 recipe has them: (1, 3, S, S) float32 → one number of each.

    Linear layers of the blocks multiply uint8 by int8; the patch embedding and attention's two
    products are float32. None waits for another, and nothing is rounded between them, so no model
    of these products can pass it on these kernels.
    """
    chain = _Chain()
    tokens, head = 1 + shape.patches(size), shape.width // shape.heads
    flat = chain.reshape("image", (shape.channels * size * size,))
    x = chain.quantize(chain.reshape(chain.part(flat, 0, tokens * shape.width), (tokens, -1)))
    codes = {
        shape.width: x,
        shape.hidden: chain.concat(*[x] * (shape.hidden // shape.width), axis=1),
    }
    ones = []
    for product in products(shape, size):
        inner, columns = product.inner, product.columns
        if product.name == "patch embedding":
            image = chain.reshape("image", (product.rows, inner))
            ones.append(chain.matmul(image, chain.weight((inner, columns))))
        elif product.name == "attention":
            for block in range(shape.depth):
                # Each block reads other numbers: a runtime computes what is the same once.
                q = chain.part(flat, 1 + block, tokens * shape.width)
                k = chain.reshape(q, (shape.heads, head, tokens))
                q = chain.reshape(q, (shape.heads, tokens, head))
                ones.append(chain.matmul(chain.matmul(q, k), q))
        elif product.name != "attention × v":
            for _ in range(product.count):
                ones.append(chain.integer_matmul(codes[inner], (inner, columns)))
    result = chain.concat(*(chain.corner(value) for value in ones), axis=0)
    return chain.model((1, shape.channels, size, size), result, (len(ones),))


class _Chain:
    """Nodes and weights of a model that is being written."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._rng = np.random.default_rng(SEED)

    def model(self, image: tuple[int, ...], output: str, shape: tuple[int, ...]) -> "ModelProto":
        """Return what was written, from ``image`` to one value; both float32, of these shapes."""
        from onnx import TensorProto, helper

        graph = helper.make_graph(
            self.nodes,
            "products",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, image)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)],
            self.initializers,
        )
        opsets = [helper.make_opsetid("", 20)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def weight(self, shape: tuple[int, int], shrink: float = 1.0) -> str:
        """A random matrix that keeps the spread of what it multiplies."""
        scale = 1 / (shrink * shape[0] ** 0.5)
        return self._constant(scale * self._rng.standard_normal(shape, np.float32))

    def matmul(self, a: str, b: str) -> str:
        """One product."""
        return self._node("MatMul", a, b)

    def concat(self, *values: str, axis: int = 0) -> str:
        """One after the other along an axis."""
        return self._node("Concat", *values, axis=axis)

    def part(self, value: str, start: int, count: int) -> str:
        """Some numbers of a vector."""
        ends = (self._constant(np.array([n], np.int64)) for n in (start, start + count))
        return self._node("Slice", value, *ends)

    def quantize(self, value: str) -> str:
        """uint8 around 128."""
        grid = (self._constant(np.array(n)) for n in (np.float32(0.02), np.uint8(128)))
        return self._node("QuantizeLinear", value, *grid)

    def integer_matmul(self, codes: str, shape: tuple[int, int]) -> str:
        """One product of uint8 with random int8, to int32."""
        weight = self._rng.integers(-127, 128, shape, np.int8)
        zero = self._constant(np.array(np.uint8(128)))
        return self._node("MatMulInteger", codes, self._constant(weight), zero)

    def corner(self, value: str) -> str:
        """The first number of a product as float32, so that it has a reader: (1,)."""
        flat = self.reshape(value, (-1,))
        return self._node("Cast", self.part(flat, 0, 1), to=1)

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
