"""Weights as they are stored: whole numbers with scales, or indices into palettes.

They are made once, from a module's weights, and every target stores these numbers.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dinoexport.recipes import PALETTE_GROUP, PRECISIONS, Precision, WeightKind

_SHRINK = np.linspace(1.0, 0.6, 9)
"""Shares of the largest weight that 4-bit scales are tried for."""
_LLOYD_STEPS = 40
_START_PARTS = 4
"""Quantiles per point that the start of k-means is read from."""

_BLOCK_SCALE_BITS = 8
"""Significant bits of a block's scale: LiteRT's kernels round them to bfloat16 (measured)."""


@dataclass(frozen=True)
class StoredWeight:
    """The weight of one layer, quantised.

    Attributes:
        precision: as it is stored, which is int8 where a block does not divide the inputs.
        shape: of the weight, output channels first.
        codes: (out, in) with all but the first axis flat. Integers: int8, symmetric, so that
            -2^(bits-1) does not occur. Palettes: uint8 indices.
        scale: (out, blocks) float32, each a half-precision number, in blocks one of 8 significant
            bits; empty for palettes.
        table: (groups, 2^bits) float32, half-precision numbers, ``PALETTE_GROUP`` output channels
            to a group; empty for integers.
    """

    precision: Precision
    shape: tuple[int, ...]
    codes: NDArray[np.int8] | NDArray[np.uint8]
    scale: NDArray[np.float32]
    table: NDArray[np.float32]

    @property
    def block(self) -> int:
        """Inputs that share a scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    def values(self) -> NDArray[np.float32]:
        """Return the numbers that the codes stand for, in the weight's shape."""
        if self.precision.kind is WeightKind.PALETTE:
            groups = np.arange(len(self.codes)) // PALETTE_GROUP
            return self.table[groups[:, None], self.codes].reshape(self.shape)
        scale = np.repeat(self.scale, self.block, axis=1)
        return (self.codes.astype(np.float32) * scale).reshape(self.shape)


def store_weight(weight: NDArray[np.float32], precision: Precision) -> StoredWeight:
    """Quantise a weight.

    Args:
        weight: output channels first, finite.
        precision: not a float one. One with blocks becomes w8 where they do not divide the
            inputs, and in convolutions over several pixels, where no format has such blocks.
    """
    flat = weight.reshape(len(weight), -1)
    empty = np.zeros((0, 0), np.float32)
    if precision.kind is WeightKind.PALETTE:
        codes, table = _palettize(flat, precision.bits)
        return StoredWeight(precision, weight.shape, codes, empty, table)
    if precision.block and (weight.shape[1] % precision.block or weight[0, 0].size > 1):
        return store_weight(weight, PRECISIONS["w8"])
    block = precision.block or flat.shape[1]
    codes, scale = _quantize(flat, precision.bits, block)
    return StoredWeight(precision, weight.shape, codes, scale, empty)


def _quantize(
    flat: NDArray[np.float32], bits: int, block: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric integers; 4-bit scales are those of the least squared error."""
    top = 2 ** (bits - 1) - 1
    blocks = flat.reshape(len(flat), -1, block)
    largest = np.abs(blocks).max(axis=2)
    kept = 11 if bits == 8 else _BLOCK_SCALE_BITS
    best = scale = _ceil_to_half(largest / top, kept)
    codes = _round_to(blocks, best, top)
    if bits < 8:
        least = _squared_error(blocks, codes, best)
        for share in _SHRINK[1:]:
            scale = _ceil_to_half(largest * share / top, kept)
            tried = _round_to(blocks, scale, top)
            error = _squared_error(blocks, tried, scale)
            better = error < least
            best = np.where(better, scale, best)
            codes = np.where(better[..., None], tried, codes)
            least = np.minimum(error, least)
    return codes.reshape(flat.shape), best


def _round_to(
    blocks: NDArray[np.float32], scale: NDArray[np.float32], top: int
) -> NDArray[np.int8]:
    return np.clip(np.round(blocks / scale[..., None]), -top, top).astype(np.int8)


def _squared_error(
    blocks: NDArray[np.float32], codes: NDArray[np.int8], scale: NDArray[np.float32]
) -> NDArray[np.float32]:
    return ((codes * scale[..., None] - blocks) ** 2).sum(axis=2)


def _ceil_to_half(values: NDArray[np.floating], significant: int) -> NDArray[np.float32]:
    """Round up to numbers of half precision, above zero: Core ML stores scales in it.

    Args:
        values: not negative.
        significant: bits that are kept, of the 11 that half precision has.
    """
    half = values.astype(np.float16)
    half = np.where(half < values, np.nextafter(half, np.float16(np.inf)), half)
    step = 1 << (11 - significant)
    half = ((half.view(np.uint16) + (step - 1)) // step * step).astype(np.uint16).view(np.float16)
    return np.maximum(half, np.finfo(np.float16).smallest_subnormal).astype(np.float32)


def _palettize(
    flat: NDArray[np.float32], bits: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """k-means in one dimension per group of output channels."""
    codes = np.empty(flat.shape, np.uint8)
    tables = []
    for start in range(0, len(flat), PALETTE_GROUP):
        rows = flat[start : start + PALETTE_GROUP]
        table = np.sort(_cluster(rows.reshape(-1), 2**bits).astype(np.float16)).astype(np.float32)
        codes[start : start + PALETTE_GROUP] = np.searchsorted((table[1:] + table[:-1]) / 2, rows)
        tables.append(table)
    return codes, np.stack(tables)


def _cluster(numbers: NDArray[np.float32], count: int) -> NDArray[np.float64]:
    """Lloyd's algorithm on sorted numbers, where a cluster is a slice and its sum a difference.

    It starts from points as dense as the cube root of the numbers' own density, which is what the
    best quantiser of many levels has (Panter and Dite, 1951).
    """
    values = np.sort(numbers.astype(np.float64))
    # Between two quantiles the density is one over their distance: their share of the points is
    # distance^(2/3). Bins of equal width would leave the bulk of a long-tailed layer to a few.
    quantiles = np.quantile(values, np.linspace(0, 1, _START_PARTS * count + 1))
    share = np.concatenate(([0.0], np.cumsum(np.diff(quantiles) ** (2 / 3))))
    wanted = (np.arange(count) + 0.5) / count * share[-1]
    centres = np.interp(wanted, share, quantiles)
    total = np.concatenate(([0.0], np.cumsum(values)))
    for _ in range(_LLOYD_STEPS):
        ends = np.searchsorted(values, (centres[1:] + centres[:-1]) / 2)
        ends = np.concatenate(([0], ends, [len(values)]))
        sizes = np.diff(ends)
        # A cluster without numbers stays where it is.
        means = np.where(sizes > 0, np.diff(total[ends]) / np.maximum(sizes, 1), centres)
        means = np.sort(means)
        if np.array_equal(means, centres):
            break
        centres = means
    return centres
