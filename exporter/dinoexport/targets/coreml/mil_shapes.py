"""MIL operations that move elements without computing on them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoexport.targets.coreml.mil_operands import Kernel, Operands, carrier


def reshape(op: Operands) -> Tensor:
    """A zero keeps the input's side at that place; one −1 is inferred."""
    x = op.tensor()
    sides = op.ints("shape") or []
    return x.reshape([x.shape[i] if side == 0 else side for i, side in enumerate(sides)])


def transpose(op: Operands) -> Tensor:
    """Axes in the order of ``perm``, which may count from the end."""
    x = op.tensor()
    return x.permute([axis % x.ndim for axis in op.ints("perm") or []])


def expand_dims(op: Operands) -> Tensor:
    """Insert sides of 1 at the axes of the output."""
    x = op.tensor()
    axes = op.ints("axes") or []
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def squeeze(op: Operands) -> Tensor:
    """Remove the named sides of 1 (all where none is named); other sides are left alone."""
    x, axes = op.tensor(), op.ints("axes")
    return x.squeeze() if axes is None else x.squeeze(axes)


def concat(op: Operands) -> Tensor:
    """Join along an axis; ``interleave`` alternates between the inputs."""
    parts, axis = op.tensors(), op.const("axis")
    if not parts[0].ndim:
        return torch.stack(parts)
    if not op.const("interleave", False):
        return torch.cat(parts, axis)
    axis %= parts[0].ndim
    return torch.stack(parts, axis + 1).flatten(axis, axis + 1)


def stack(op: Operands) -> Tensor:
    """Join along a new axis."""
    return torch.stack(op.tensors(), op.const("axis"))


def split(op: Operands) -> list[Tensor]:
    """Cut along an axis into parts whose sizes the outputs declare."""
    axis = op.const("axis")
    sizes = [op.shape(index)[axis] for index in range(len(op.operation.outputs))]
    return list(op.tensor().split(sizes, axis))


def _stepped(length: int, part: slice) -> list[int]:
    return list(range(*part.indices(length)))


def slice_by_index(op: Operands) -> Tensor:
    """NumPy's basic slicing; a masked begin or end is open, a squeezed axis picks ``begin``."""
    x = op.tensor()
    begin, end = op.ints("begin") or [], op.ints("end") or []
    stride = op.ints("stride") or [1] * x.ndim
    open_begin = op.flags("begin_mask", x.ndim)
    open_end = op.flags("end_mask", x.ndim)
    squeezed = op.flags("squeeze_mask", x.ndim)
    for axis in reversed(range(x.ndim)):
        if squeezed[axis]:
            x = x.select(axis, 0 if open_begin[axis] else begin[axis])
            continue
        part = slice(
            None if open_begin[axis] else begin[axis],
            None if open_end[axis] else end[axis],
            stride[axis],
        )
        steps = _stepped(x.shape[axis], part)
        if stride[axis] == 1:
            x = x.narrow(axis, steps[0] if steps else 0, len(steps))
        else:
            x = x.index_select(axis, torch.tensor(steps, dtype=torch.int64))
    return x


def slice_by_size(op: Operands) -> Tensor:
    """``size`` elements from ``begin`` on; −1 takes the rest."""
    x = op.tensor()
    starts, sizes = op.ints("begin") or [], op.ints("size") or []
    for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        start %= x.shape[axis]
        x = x.narrow(axis, start, x.shape[axis] - start if size == -1 else size)
    return x


def pad(op: Operands) -> Tensor:
    """Pad the last axes; ``pad`` lists (before, after) from the first padded axis on."""
    x, amounts, mode = op.tensor(), op.ints("pad") or [], op.const("mode", "constant")
    pairs = list(zip(amounts[::2], amounts[1::2], strict=True))
    if mode == "constant":
        # torch lists the last axis first.
        flat = [side for pair in reversed(pairs) for side in pair]
        return F.pad(x, flat, value=op.const("constant_val", 0.0))
    for axis, (before, after) in enumerate(pairs, start=x.ndim - len(pairs)):
        steps = torch.arange(-before, x.shape[axis] + after)
        last = x.shape[axis] - 1
        steps = last - (last - steps.abs()).abs() if mode == "reflect" else steps.clamp(0, last)
        x = x.index_select(axis, steps)
    return x


def crop(op: Operands) -> Tensor:
    """Take (before, after) elements off the last two axes."""
    x = op.tensor()
    for axis, name in ((x.ndim - 2, "crop_height"), (x.ndim - 1, "crop_width")):
        before, after = op.ints(name) or [0, 0]
        x = x.narrow(axis, before, x.shape[axis] - before - after)
    return x


def tile(op: Operands) -> Tensor:
    """Repeat along every axis."""
    return op.tensor().repeat(op.ints("reps") or [])


def reverse(op: Operands) -> Tensor:
    """Flip the named axes, all where none is named."""
    x, axes = op.tensor(), op.ints("axes")
    return x.flip(list(range(x.ndim)) if axes is None else axes)


def gather(op: Operands) -> Tensor:
    """Whole slices along an axis; the axis is replaced by the shape of the indices."""
    x, indices = op.tensor(), op.tensor("indices").long()
    axis = op.const("axis", 0) % x.ndim
    batch_dims = op.const("batch_dims", 0)
    if batch_dims:
        lead = x.shape[:batch_dims]
        flat_x = x.reshape(-1, *x.shape[batch_dims:])
        flat_indices = indices.reshape(flat_x.shape[0], *indices.shape[batch_dims:])
        rows = [
            _take(row, picked, axis - batch_dims)
            for row, picked in zip(flat_x, flat_indices, strict=True)
        ]
        joined = torch.stack(rows)
        return joined.reshape(*lead, *joined.shape[1:])
    return _take(x, indices, axis)


def _take(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    picked = x.index_select(axis, indices.reshape(-1))
    return picked.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def gather_along_axis(op: Operands) -> Tensor:
    """Element by element along an axis, as ``numpy.take_along_axis``."""
    x, indices, axis = op.tensor(), op.tensor("indices").long(), op.const("axis", 0)
    return torch.take_along_dim(x, torch.where(indices < 0, indices + x.shape[axis], indices), axis)


def fill(op: Operands) -> Tensor:
    """One value in a given shape."""
    return torch.full(op.ints("shape") or [], op.const("value", 0.0), dtype=carrier(op.dtype()))


def fill_like(op: Operands) -> Tensor:
    """One value in the shape of another tensor."""
    shape = op.tensor("ref_tensor").shape
    return torch.full(shape, op.const("value", 0.0), dtype=carrier(op.dtype()))


def shape(op: Operands) -> Tensor:
    """The sides of a tensor, int32."""
    return torch.tensor(op.tensor().shape, dtype=torch.int32)


def range_1d(op: Operands) -> Tensor:
    """start, start + step, ... below end."""
    start, end, step = (op.tensor(name).item() for name in ("start", "end", "step"))
    return torch.arange(start, end, step, dtype=carrier(op.dtype()))


def topk(op: Operands) -> list[Tensor]:
    """The k largest (or smallest) values along an axis and their places; ties keep order."""
    x, axis, count = op.tensor(), op.const("axis", -1), op.const("k", 1)
    values, places = x.sort(dim=axis, descending=not op.const("ascending", False), stable=True)
    found = [values.narrow(axis, 0, count), places.narrow(axis, 0, count)]
    return found[: len(op.operation.outputs)]


def argsort(op: Operands) -> Tensor:
    """Places in sorted order, largest first unless ``ascending``; ties keep order."""
    descending = not op.const("ascending", False)
    return torch.sort(op.tensor(), dim=op.const("axis", -1), descending=descending, stable=True)[1]


def pixel_shuffle(op: Operands) -> Tensor:
    """(N, C·f², H, W) → (N, C, H·f, W·f)."""
    return F.pixel_shuffle(op.tensor(), op.const("upscale_factor"))


def pixel_unshuffle(op: Operands) -> Tensor:
    """(N, C, H·f, W·f) → (N, C·f², H, W)."""
    return F.pixel_unshuffle(op.tensor(), op.const("downscale_factor"))


SHAPES: dict[str, Kernel] = {
    "argsort": argsort,
    "concat": concat,
    "crop": crop,
    "expand_dims": expand_dims,
    "fill": fill,
    "fill_like": fill_like,
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "pad": pad,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "range_1d": range_1d,
    "reshape": reshape,
    "reverse": reverse,
    "shape": shape,
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "split": split,
    "squeeze": squeeze,
    "stack": stack,
    "tile": tile,
    "topk": topk,
    "transpose": transpose,
}
