"""Products of attention in four axes, as they were captured: the converter writes them in three.

LiteRT's GPU delegate was seen to take products of three axes and to give wrong values, and the
reshapes around them are copies of whole attention maps (1 % of a ViT-S at 224 on a CPU).

    Before:  RESHAPE (1, h, q, k) → (h, q, k), of both sides; BATCH_MATMUL; RESHAPE back
    After:   BATCH_MATMUL of (1, h, q, k)
"""

from collections import Counter
from typing import Any

import numpy as np

from dinoexport.targets.tflite.graph import Graph, Kind, Type

_Shape = tuple[int, ...]


def widen_products_(graph: Graph) -> None:
    """Give each product of activations four axes, in place.

    What is multiplied and added, and in which order, stays. No side is marked as transposed, which
    GPU delegates are known to overlook.
    """
    _Writer(graph).run()


class _Writer:
    """Writes operators one after the other, products with what they need before and behind."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._makers = {index: o for o in graph.operators for index in o.outputs}
        self._readers = {index: o for o in graph.operators for index in o.inputs}
        self._reads = Counter(index for o in graph.operators for index in o.inputs)
        self._operators: list[Any] = []

    def run(self) -> None:
        """Write all operators; reshapes that nothing reads any more are left out."""
        graph = self._graph
        products = [o for o in graph.operators if self._is_narrow_product(o)]
        batches = {id(o): self._batch(o) for o in products}
        skipped = {id(self._after(o)) for o in products} - {id(None)}
        for operator in graph.operators:
            if id(operator) in batches:
                self._write_wide(operator, batches[id(operator)])
            elif id(operator) not in skipped:
                self._operators.append(operator)
        graph.operators = self._without_unread()

    def _is_narrow_product(self, operator: Any) -> bool:
        ends = (*operator.inputs, *operator.outputs)
        return self._graph.kind(operator) == Kind.BATCH_MATMUL and all(
            len(self._graph.shape(index)) == 3 for index in ends
        )

    def _after(self, product: Any) -> Any:
        """Return the reshape behind a product, where it is all that reads it."""
        (result,) = product.outputs
        reader = self._readers.get(result)
        alone = reader is not None and self._reads[result] == 1
        return reader if alone and self._graph.kind(reader) == Kind.RESHAPE else None

    def _before(self, index: int) -> int | None:
        """Return what was reshaped into a side of a product."""
        maker = self._makers.get(index)
        if maker is None or self._graph.kind(maker) != Kind.RESHAPE:
            return None
        return maker.inputs[0]

    def _batch(self, product: Any) -> _Shape:
        """Return the first two of four axes, from an end that had them; else one and all."""
        after = self._after(product)
        pairs = [(self._before(index), index) for index in product.inputs]
        pairs += [] if after is None else [(after.outputs[0], product.outputs[0])]
        for wide, narrow in pairs:
            shape = () if wide is None else self._graph.shape(wide)
            if len(shape) == 4 and shape[2:] == self._graph.shape(narrow)[1:]:
                return shape[:2]
        return 1, self._graph.shape(product.outputs[0])[0]

    def _write_wide(self, product: Any, batch: _Shape) -> None:
        graph, (result,) = self._graph, product.outputs
        product.inputs = [self._widen(index, batch) for index in product.inputs]
        shape = (*batch, *graph.shape(result)[1:])
        after = self._after(product)
        target = result if after is None else after.outputs[0]
        self._operators.append(product)
        if graph.shape(target) == shape:
            product.outputs = [target]
            return
        product.outputs = [graph.add_tensor(f"{graph.name(result)}/wide", shape, Type.FLOAT32)]
        self._reshape(product.outputs[0], target)

    def _widen(self, index: int, batch: _Shape) -> int:
        """Return a side of a product in four axes."""
        graph = self._graph
        shape = (*batch, *graph.shape(index)[1:])
        before = self._before(index)
        source = index if before is None else before
        if graph.shape(source) == shape:
            return source
        wide = graph.add_tensor(f"{graph.name(index)}/wide", shape, Type.FLOAT32)
        self._reshape(source, wide)
        return wide

    def _reshape(self, source: int, target: int) -> None:
        graph, shape = self._graph, self._graph.shape(target)
        sides = np.array(shape, np.int32)
        name = f"{graph.name(target)}/shape"
        asked = graph.add_constant(name, (len(shape),), Type.INT32, sides)
        self._operators.append(graph.operator(Kind.RESHAPE, 1, [source, asked], [target]))

    def _without_unread(self) -> list[Any]:
        """Drop reshapes whose result nothing reads and the file does not give."""
        read = {index for o in self._operators for index in o.inputs} | self._graph.outputs
        return [
            o
            for o in self._operators
            if self._graph.kind(o) != Kind.RESHAPE or read.intersection(o.outputs)
        ]
