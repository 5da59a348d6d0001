"""What each tensor of a TFLite file is computed from, as a digest: equal digests, equal values.

Two files that one converter made of one graph are compared so without running either.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from dinoexport.targets.tflite.graph import Graph, Kind

_NCHW = (0, 3, 1, 2)


class Origins:
    """Digests of all tensors of a file.

    The digest of a result covers its operator's kind, version and options, the shapes and types of
    what the operator reads and gives, and the digests of what it reads, down to the inputs by their
    names and to the bytes of all constants. Kernels are functions of just that, so tensors of equal
    digests hold the same bits in the same order, whatever the picture. A RESHAPE has the digest of
    what it reads: it moves nothing.

    Args:
        graph: of float32 layers, as the converter made it.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._makers: dict[int, Any] = {i: o for o in graph.operators for i in o.outputs}
        self._digests: dict[int, bytes] = {
            index: _digest("input", name) for name, index in graph.ports("inputs").items()
        }
        for operator in graph.operators:
            self._add(operator)

    def of(self, index: int) -> bytes:
        """Return a tensor's digest."""
        if index not in self._digests:
            self._digests[index] = _digest("constant", self._facts(index), self._graph.view(index))
        return self._digests[index]

    def results(self) -> dict[bytes, int]:
        """{digest: the first tensor, in running order, that an operator fills with it}."""
        found: dict[bytes, int] = {}
        for operator in self._graph.operators:
            for index in operator.outputs:
                found.setdefault(self.of(index), index)
        return found

    def channels_last(self, index: int) -> bytes | None:
        """Return the digest of the (B, H, W, C) form that a (B, C, H, W) tensor is turned from.

        Returns:
            None where the tensor is no such transposition.
        """
        maker = self._makers.get(index)
        while maker is not None and self._graph.kind(maker) == Kind.RESHAPE:
            maker = self._makers.get(maker.inputs[0])
        if maker is None or self._graph.kind(maker) != Kind.TRANSPOSE:
            return None
        order = np.frombuffer(self._graph.data(maker.inputs[1]), np.int32)
        return self.of(maker.inputs[0]) if tuple(order) == _NCHW else None

    def _add(self, operator: Any) -> None:
        if self._graph.kind(operator) == Kind.RESHAPE:
            self._digests[operator.outputs[0]] = self.of(operator.inputs[0])
            return
        reads = [(self._facts(i), self.of(i)) if i >= 0 else None for i in operator.inputs]
        gives = [self._facts(i) for i in operator.outputs]
        facts = (self._graph.kind(operator), self._graph.version(operator), _options(operator))
        for place, index in enumerate(operator.outputs):
            self._digests[index] = _digest("result", place, *facts, reads, gives)

    def _facts(self, index: int) -> tuple[Any, ...]:
        return self._graph.tensor(index).type, self._graph.shape(index)


def _options(operator: Any) -> list[Any]:
    options = (operator.builtinOptions, operator.builtinOptions2, operator.customOptions)
    return [_plain(o) for o in options]


def _plain(value: Any) -> Any:
    """Return options as values that print alike where they are alike."""
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(v) for v in np.asarray(value).tolist()]
    if hasattr(value, "__dict__"):
        fields: Mapping[str, Any] = vars(value)
        return type(value).__name__, [(name, _plain(fields[name])) for name in sorted(fields)]
    return value


def _digest(*parts: Any) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        raw = part.data if isinstance(part, np.ndarray) else repr(part).encode()
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.digest()
