"""Stored weights → constants of few bytes, and nodes of the standard domain that unpack them.

A runtime folds these nodes while it loads, so that the arithmetic and its speed are those of float
weights. onnxruntime turns the obvious form, DequantizeLinear before MatMul, into products with
activations rounded to 8 bits (38 dB at the last block of a ViT-S), and runs it anew for each
picture where it does not; so no recipe of float activations is written that way.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from dinoexport.quantize.weights import StoredWeight
from dinoexport.recipes import PALETTE_GROUP, WeightKind
from dinoexport.targets.onnx.draft import Draft


@dataclass(frozen=True)
class Place:
    """Where a weight stands in the graph.

    Attributes:
        name: of the value that nodes read.
        shape: of that value.
        transposed: (in, out), as MatMul reads it; else output channels come first.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool

    def turn(self, array: NDArray) -> NDArray:
        """Bring an array whose first axis are output channels into the order of this place."""
        return np.moveaxis(array, 0, -1) if self.transposed else array


def unpack_weight(draft: Draft, place: Place, stored: StoredWeight) -> None:
    """Add constants, and nodes that compute ``place.name`` from them: float32, exactly
    ``stored.values()``.
    """
    if stored.precision.kind is WeightKind.PALETTE:
        _look_up(draft, place, stored)
    elif stored.precision.bits == 4:
        _scale_blocks(draft, place, stored)
    else:
        _scale_channels(draft, place, stored)


def _scale_channels(draft: Draft, place: Place, stored: StoredWeight) -> None:
    """codes → Cast → Mul."""
    name = place.name
    codes = place.turn(stored.codes.reshape(stored.shape))
    scale = stored.scale.reshape(-1, *[1] * (len(stored.shape) - 1))
    number = draft.cast(draft.constant(f"{name}_codes", codes), TensorProto.FLOAT, f"{name}_number")
    draft.node("Mul", [number, draft.constant(f"{name}_scale", place.turn(scale))], name)


def _scale_blocks(draft: Draft, place: Place, stored: StoredWeight) -> None:
    """4-bit codes → unpacked → Cast → Sub → Mul → Reshape."""
    name = place.name
    blocks = (stored.codes + 8).astype(np.uint8).reshape(len(stored.codes), -1, stored.block)
    codes = _unpack(draft, place, blocks)
    number = draft.cast(codes, TensorProto.FLOAT, f"{name}_number")
    middle = draft.constant(f"{name}_middle", np.float32(8))
    centred = draft.node("Sub", [number, middle], f"{name}_centred")
    scale = draft.constant(f"{name}_scale", place.turn(stored.scale[:, :, None]))
    scaled = draft.node("Mul", [centred, scale], f"{name}_scaled")
    shape = draft.constant(f"{name}_shape", np.array(place.shape, np.int64))
    draft.node("Reshape", [scaled, shape], name)


def _look_up(draft: Draft, place: Place, stored: StoredWeight) -> None:
    """Indices → the table's numbers, of which each group of output channels has its own."""
    name = place.name
    codes = stored.codes.astype(np.uint8)[:, None]
    if stored.precision.bits == 4 and codes.shape[2] % 2 == 0:
        packed = _unpack(draft, place, codes)
    else:
        packed = draft.constant(f"{name}_codes", place.turn(codes))
    index = draft.cast(packed, TensorProto.INT32, f"{name}_index")
    group = np.arange(len(stored.codes), dtype=np.int32) // PALETTE_GROUP
    first = place.turn((group * stored.table.shape[1])[:, None, None])
    start = draft.constant(f"{name}_start", first)
    entry = draft.node("Add", [index, start], f"{name}_entry")
    table = draft.constant(f"{name}_table", stored.table.reshape(-1))
    number = draft.node("Gather", [table, entry], f"{name}_number", axis=0)
    shape = draft.constant(f"{name}_shape", np.array(place.shape, np.int64))
    draft.node("Reshape", [number, shape], name)


def _unpack(draft: Draft, place: Place, codes: NDArray[np.uint8]) -> str:
    """Pack codes of 0..15 in twos, and add the nodes that part them.

    Args:
        codes: (out, blocks, block); the second half of each block goes into the upper bits.
    """
    name = place.name
    half = codes.shape[2] // 2
    packed = draft.constant(
        f"{name}_codes", place.turn(codes[..., :half] | (codes[..., half:] << 4))
    )
    mask = draft.constant(f"{name}_mask", np.uint8(15))
    low = draft.node("BitwiseAnd", [packed, mask], f"{name}_low")
    bits = draft.constant(f"{name}_bits", np.uint8(4))
    high = draft.node("BitShift", [packed, bits], f"{name}_high", direction="RIGHT")
    return draft.node("Concat", [low, high], f"{name}_parted", axis=1 if place.transposed else 2)
