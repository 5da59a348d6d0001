"""MIL operations that unpack compressed weights, and those that quantise activations.

iOS 16 and iOS 18 spell unpacking differently under one name: iOS 16 packs bits into bytes and
gives the ``shape``, iOS 18 stores small types and gives blocks.
"""

import numpy as np
import torch
from coremltools.converters.mil.mil import types
from torch import Tensor

from dinoexport.targets.coreml.mil_operands import Kernel, Operands


def _along(values: Tensor | None, like: Tensor, axis: int | None) -> Tensor | float:
    """Shape a scalar or a vector so that it runs along one axis of another tensor."""
    if values is None:
        return 0.0
    if not values.ndim or axis is None:
        return values.float()
    sides = [1] * like.ndim
    sides[axis] = -1
    return values.float().reshape(sides)


def constexpr_affine_dequantize(op: Operands) -> Tensor:
    """scale·(data − zero_point), per tensor or along one axis."""
    data, axis = op.tensor("quantized_data"), op.const("axis")
    zero_point = _along(op.maybe("zero_point"), data, axis)
    return _along(op.tensor("scale"), data, axis) * (data.float() - zero_point)


def _repeat_blocks(values: Tensor, like: Tensor) -> Tensor:
    for axis, side in enumerate(like.shape):
        values = values.repeat_interleave(side // values.shape[axis], axis)
    return values


def constexpr_blockwise_shift_scale(op: Operands) -> Tensor:
    """scale·(data − offset) with one scale and offset per block."""
    data, offset = op.tensor("data").float(), op.maybe("offset")
    if offset is not None:
        data = data - _repeat_blocks(offset.float(), data)
    return _repeat_blocks(op.tensor("scale"), data) * data


def _unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Read ``count`` unsigned values of ``bits`` bits, least significant bit first."""
    flat = np.unpackbits(packed.numpy().astype(np.uint8), bitorder="little")
    fields = flat[: count * bits].reshape(count, bits).astype(np.int64)
    return torch.from_numpy(fields @ (1 << np.arange(bits)))


def constexpr_lut_to_dense(op: Operands) -> Tensor:
    """Look every index up in its palette."""
    indices, lut, sides = op.tensor("indices"), op.tensor("lut"), op.ints("shape")
    if sides is not None:
        bits = (lut.shape[0] - 1).bit_length()
        return lut[_unpack(indices, bits, int(np.prod(sides)))].reshape(sides)
    # iOS 18: lut is (palettes per axis of the indices..., entries, vector length).
    blocks = [
        (torch.arange(side) // (side // lut.shape[axis])).reshape(
            [-1 if other == axis else 1 for other in range(indices.ndim)]
        )
        for axis, side in enumerate(indices.shape)
    ]
    found = lut[(*blocks, indices.long())]
    if lut.shape[-1] == 1:
        return found.squeeze(-1)
    axis = op.const("vector_axis") % indices.ndim
    return found.movedim(-1, axis + 1).flatten(axis, axis + 1)


def constexpr_sparse_to_dense(op: Operands) -> Tensor:
    """Place the stored values where the mask is set, zero elsewhere."""
    values, mask, sides = op.tensor("nonzero_data"), op.tensor("mask"), op.ints("shape")
    if sides is not None:
        mask = _unpack(mask, 1, int(np.prod(sides))).reshape(sides)
    dense = torch.zeros(mask.shape, dtype=values.dtype)
    dense[mask != 0] = values
    return dense


def constexpr_cast(op: Operands) -> Tensor:
    """Half precision stored, float32 used: the carrier is float32 already."""
    return op.tensor("source_val")


def _scaled(op: Operands) -> tuple[Tensor, Tensor | float]:
    x, axis = op.tensor("input"), op.const("axis")
    return x / _along(op.tensor("scale"), x, axis), _along(op.maybe("zero_point"), x, axis)


def quantize(op: Operands) -> Tensor:
    """clip(round(x/scale) + zero_point), halves to even, in the range of the output's type."""
    scaled, zero_point = _scaled(op)
    low, high = (-128, 127) if op.dtype() is types.int8 else (0, 255)
    return (torch.round(scaled) + zero_point).clamp(low, high)


def quantize_exactly(op: Operands) -> Tensor:
    """x/scale + zero_point, which ``dequantize`` undoes if it has the same scale."""
    scaled, zero_point = _scaled(op)
    return scaled + zero_point


def dequantize(op: Operands) -> Tensor:
    """scale·(x − zero_point)."""
    x, axis = op.tensor("input"), op.const("axis")
    zero_point = _along(op.maybe("zero_point"), x, axis)
    return _along(op.tensor("scale"), x, axis) * (x.float() - zero_point)


CONSTANTS: dict[str, Kernel] = {
    "constexpr_affine_dequantize": constexpr_affine_dequantize,
    "constexpr_blockwise_shift_scale": constexpr_blockwise_shift_scale,
    "constexpr_cast": constexpr_cast,
    "constexpr_lut_to_dense": constexpr_lut_to_dense,
    "constexpr_sparse_to_dense": constexpr_sparse_to_dense,
    "dequantize": dequantize,
    "quantize": quantize,
}

EXACT: dict[str, Kernel] = {"quantize": quantize_exactly}
"""What is computed otherwise where activations are not rounded."""
