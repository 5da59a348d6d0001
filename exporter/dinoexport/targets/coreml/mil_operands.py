"""What one MIL operation reads: its inputs as torch tensors or as compile-time values.

Every floating-point type is carried as float32; rounding to half precision is the evaluator's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from coremltools.converters.mil.mil import types
from torch import Tensor

CARRIER: dict[Any, torch.dtype] = {
    types.fp16: torch.float32,
    types.fp32: torch.float32,
    types.bool: torch.bool,
    types.int8: torch.int8,
    types.uint8: torch.uint8,
    types.int16: torch.int16,
    types.uint16: torch.int32,
    types.int32: torch.int32,
    types.uint32: torch.int64,
    types.int64: torch.int64,
}
"""The torch type that carries each MIL type; types below one byte are in ``SUB_BYTE``."""

SUB_BYTE = (types.uint1, types.uint2, types.uint3, types.uint4, types.uint6, types.int4)


def is_carried(dtype: Any) -> bool:
    """Return whether a MIL element type is one of numbers or truth values."""
    return dtype in CARRIER or dtype in SUB_BYTE


def carrier(dtype: Any) -> torch.dtype:
    """Return the torch type that carries a MIL element type."""
    if dtype in SUB_BYTE:
        return torch.int8 if dtype is types.int4 else torch.uint8
    return CARRIER[dtype]


def as_tensor(value: Any, dtype: Any) -> Tensor:
    """Turn a stored constant (NumPy array or scalar) into its carrier, values unchanged."""
    wanted = torch.empty(0, dtype=carrier(dtype)).numpy().dtype
    # One copy: coremltools hands out read-only views of the weight file, and weights are large.
    return torch.from_numpy(np.asarray(value).astype(wanted, order="C"))


Read = Callable[[Any], Tensor]
"""Turns a MIL variable into its value."""


class Operands:
    """The inputs of one operation."""

    def __init__(self, operation: Any, read: Read) -> None:
        self.operation = operation
        self.read = read

    def tensor(self, name: str = "x") -> Tensor:
        """Return a required input as a tensor."""
        return self.read(self.operation.inputs[name])

    def maybe(self, name: str) -> Tensor | None:
        """Return an optional input as a tensor, or None where it was not given."""
        var = self.operation.inputs.get(name)
        return None if var is None else self.read(var)

    def tensors(self, name: str = "values") -> list[Tensor]:
        """Return a tuple input, such as the parts of a concatenation."""
        return [self.read(var) for var in self.operation.inputs[name]]

    def const(self, name: str, default: Any = None) -> Any:
        """Return a compile-time scalar or string, or ``default`` where it was not given."""
        var = self.operation.inputs.get(name)
        if var is None or var.val is None:
            return default
        value = var.val
        return value.item() if isinstance(value, np.generic | np.ndarray) else value

    def ints(self, name: str) -> list[int] | None:
        """Return a list of whole numbers (axes, sizes), computed ones included, or None."""
        var = self.operation.inputs.get(name)
        if var is None:
            return None
        return [int(value) for value in self.read(var).reshape(-1).tolist()]

    def flags(self, name: str, count: int) -> list[bool]:
        """Return a mask of ``count`` entries, all False where it was not given."""
        found = self.ints(name)
        return [False] * count if found is None else [bool(value) for value in found]

    def shape(self, index: int = 0) -> tuple[int, ...]:
        """Return the declared shape of one output."""
        return tuple(int(side) for side in self.operation.outputs[index].shape)

    def dtype(self, index: int = 0) -> Any:
        """Return the declared MIL element type of one output."""
        return self.operation.outputs[index].dtype


Kernel = Callable[[Operands], Tensor | Sequence[Tensor]]
"""Computes the outputs of one operation, in declared order."""
