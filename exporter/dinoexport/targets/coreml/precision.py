"""Which operations of a Core ML conversion stay in float32 while the rest is half precision."""

from collections.abc import Callable, Collection
from typing import Any


def half_before(nodes: Collection[str]) -> Callable[[Any], bool]:
    """Select for half precision all but the named nodes and everything computed from them.

    Means and variances of group normalisations stay in float32 too: a variance is a mean of
    squares, and those of activations above 256 pass the range of half precision, silently.

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
    statistics: dict[int, Any] = {}

    def comes_after(operation: Any) -> bool:
        if id(operation) in known:
            return known[id(operation)][1]
        named = any(_node_name(var.name) in wanted for var in operation.outputs)
        found = named or any(comes_after(source) for source in _sources(operation))
        known[id(operation)] = (operation, found)
        return found

    def may_be_half(operation: Any) -> bool:
        # Asked in running order: the first mean is met before anything behind it is changed.
        statistics.update((id(part), part) for part in normalisation_parts(operation))
        return id(operation) not in statistics and not comes_after(operation)

    return may_be_half


def normalisation_parts(mean: Any) -> list[Any]:
    """Return the operations of a normalisation that is written out, from its first one on.

    The converter has an operation for LayerNorm and none for GroupNorm, which becomes

        m = reduce_mean(x); c = sub(x, m); v = reduce_mean(square(c)); real_div(c, sqrt(v + eps))

    Args:
        mean: a MIL operation.

    Returns:
        All seven, or nothing where ``mean`` starts no such chain.
    """
    parts = [mean]
    if mean.op_type != "reduce_mean":
        return []
    for kind in ("sub", "square", "reduce_mean", "add", "sqrt", "real_div"):
        step = next((op for op in _readers(parts[-1]) if op.op_type == kind), None)
        if step is None:
            return []
        parts.append(step)
    return parts


def _node_name(variable: str) -> str:
    return variable.removesuffix("_cast_fp16")


def _readers(operation: Any) -> list[Any]:
    return [reader for var in operation.outputs for reader in var.child_ops]


def _sources(operation: Any) -> list[Any]:
    sources = []
    for entry in operation.inputs.values():
        for var in entry if isinstance(entry, list | tuple) else [entry]:
            if var is not None and var.op is not None:
                sources.append(var.op)
    return sources
