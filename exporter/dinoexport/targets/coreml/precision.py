"""Which operations of a Core ML conversion stay in float32 while the rest is half precision."""

from collections.abc import Callable, Collection
from typing import Any


def half_before(nodes: Collection[str]) -> Callable[[Any], bool]:
    """Select for half precision all but the named nodes and everything computed from them.

    Pass it as ``ct.transform.FP16ComputePrecision(op_selector=half_before({"add_24"}))`` for
    ``compute_precision``. The converter asks before it casts an operation, while variables still
    carry the node names of the captured program.

    Args:
        nodes: names (``node.name``) in the exported program's graph.

    Returns:
        A function of one MIL operation: True where it may be cast to half precision.
    """
    wanted = frozenset(nodes)
    # Held by operation, not by id alone: an operation removed by a pass frees its id.
    known: dict[int, tuple[Any, bool]] = {}

    def comes_after(operation: Any) -> bool:
        if id(operation) in known:
            return known[id(operation)][1]
        named = any(_node_name(var.name) in wanted for var in operation.outputs)
        found = named or any(comes_after(source) for source in _sources(operation))
        known[id(operation)] = (operation, found)
        return found

    return lambda operation: not comes_after(operation)


def _node_name(variable: str) -> str:
    return variable.removesuffix("_cast_fp16")


def _sources(operation: Any) -> list[Any]:
    sources = []
    for entry in operation.inputs.values():
        for var in entry if isinstance(entry, list | tuple) else [entry]:
            if var is not None and var.op is not None:
                sources.append(var.op)
    return sources
