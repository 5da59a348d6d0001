"""MIL operations with weights or windows: products, convolutions, pools, norms, resizing."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoexport.targets.coreml.mil_operands import Kernel, Operands

# Any, because torch types each of these as overloads with different parameter names.
_CONV: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE: dict[int, Any] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}
_MAX_POOL: dict[int, Any] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def linear(op: Operands) -> Tensor:
    """x·weightᵀ + bias."""
    x, weight, bias = op.tensor(), op.tensor("weight"), op.maybe("bias")
    if not x.is_floating_point():
        # torch has no whole-number linear layer.
        product = x @ weight.T
        return product if bias is None else product + bias
    return F.linear(x, weight, bias)


def matmul(op: Operands) -> Tensor:
    """Batched product; either side may have its last two axes swapped first."""
    x, y = op.tensor("x"), op.tensor("y")
    x = x.mT if op.const("transpose_x", False) else x
    y = y.mT if op.const("transpose_y", False) else y
    return x @ y


def scaled_dot_product_attention(op: Operands) -> Tensor:
    """softmax(q·kᵀ/√d + mask)·v; a boolean mask keeps where it is True."""
    query, key, value = (op.tensor(name) for name in ("query", "key", "value"))
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    mask = op.maybe("attn_mask")
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ value


def einsum(op: Operands) -> Tensor:
    """Product by equation."""
    return torch.einsum(op.const("equation").replace(" ", ""), *op.tensors())


def _pads(op: Operands, sides: Sequence[int], kernel: Sequence[int]) -> list[tuple[int, int]]:
    """(before, after) of each spatial axis for a convolution or a pool.

    Args:
        op: reads ``pad_type``, ``pad``, ``strides``.
        sides: spatial sides of the input.
        kernel: spatial sides of the dilated window.
    """
    kind = str(op.const("pad_type", "valid")).lower()
    if kind == "valid":
        return [(0, 0)] * len(sides)
    if kind == "custom":
        amounts = op.ints("pad") or []
        return list(zip(amounts[::2], amounts[1::2], strict=True))
    pairs = []
    for side, window, stride in zip(sides, kernel, op.ints("strides") or [], strict=True):
        total = max(0, (math.ceil(side / stride) - 1) * stride + window - side)
        less, more = total // 2, total - total // 2
        pairs.append((less, more) if kind == "same" else (more, less))
    return pairs


def _pad_spatial(x: Tensor, pairs: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    flat = [side for pair in reversed(pairs) for side in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


def conv(op: Operands) -> Tensor:
    """Convolution over one to three spatial axes."""
    x, weight = op.tensor(), op.tensor("weight")
    dilations = op.ints("dilations") or [1] * (x.ndim - 2)
    kernel = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations, strict=True)]
    x = _pad_spatial(x, _pads(op, x.shape[2:], kernel))
    run = _CONV[x.ndim - 2]
    strides, groups = op.ints("strides"), op.const("groups", 1)
    return run(x, weight, op.maybe("bias"), strides, 0, dilations, groups)


def conv_transpose(op: Operands) -> Tensor:
    """Transposed convolution: the full one, cropped by the padding to the declared shape."""
    x, weight, bias = op.tensor(), op.tensor("weight"), op.maybe("bias")
    spatial = x.ndim - 2
    strides, dilations = op.ints("strides"), op.ints("dilations")
    run = _CONV_TRANSPOSE[spatial]
    full = run(x, weight, None, strides, 0, 0, op.const("groups", 1), dilations)
    kind, amounts = op.const("pad_type", "valid"), op.ints("pad") or [0] * 2 * spatial
    for axis, wanted in enumerate(op.shape()[2:]):
        size = full.shape[axis + 2]
        before = amounts[2 * axis] if kind == "custom" else 0
        if kind == "same":
            before = max(0, size - wanted) // 2
        # An output longer than the full one (output padding) reaches no input: zeros.
        missing = max(0, before + wanted - size)
        tail = [0, 0] * (spatial - 1 - axis) + [0, missing]
        full = F.pad(full, tail) if missing else full
        full = full.narrow(axis + 2, before, wanted)
    return full if bias is None else full + bias.reshape(-1, *[1] * spatial)


def max_pool(op: Operands) -> Tensor:
    """Largest value of each window; padding never wins."""
    x, kernel = op.tensor(), op.ints("kernel_sizes") or []
    pairs = _pads(op, x.shape[2:], kernel)
    run, strides = _MAX_POOL[x.ndim - 2], op.ints("strides")
    if op.const("ceil_mode", False):
        return run(x, kernel, strides, [before for before, _ in pairs], ceil_mode=True)
    return run(_pad_spatial(x, pairs, -math.inf), kernel, strides)


def avg_pool(op: Operands) -> Tensor:
    """Mean of each window; padding counts as zero unless it is excluded from the count."""
    x, kernel = op.tensor(), op.ints("kernel_sizes") or []
    pairs = _pads(op, x.shape[2:], kernel)
    run, strides = _AVG_POOL[x.ndim - 2], op.ints("strides")
    exclude = op.const("exclude_padding_from_average", False)
    if op.const("ceil_mode", False):
        before = [pair[0] for pair in pairs]
        return run(x, kernel, strides, before, ceil_mode=True, count_include_pad=not exclude)
    mean = run(_pad_spatial(x, pairs), kernel, strides)
    if not exclude:
        return mean
    return mean / run(_pad_spatial(torch.ones_like(x[:1, :1]), pairs), kernel, strides)


def _per_channel(values: Tensor | None, like: Tensor) -> Tensor | None:
    return None if values is None else values.reshape(1, -1, *[1] * (like.ndim - 2))


def _affine(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    x = x if gamma is None else x * gamma
    return x if beta is None else x + beta


def layer_norm(op: Operands) -> Tensor:
    """(x − mean)/sqrt(var + epsilon)·gamma + beta over ``axes``, biased variance."""
    x = op.tensor()
    axes = sorted(axis % x.ndim for axis in op.ints("axes") or range(x.ndim))
    gamma, beta = op.maybe("gamma"), op.maybe("beta")
    epsilon = op.const("epsilon", 1e-5)
    if axes == list(range(axes[0], x.ndim)):
        return F.layer_norm(x, x.shape[axes[0] :], gamma, beta, epsilon)
    wide = [x.shape[axis] if axis in axes else 1 for axis in range(x.ndim)]
    centred = x - x.mean(axes, keepdim=True)
    normed = centred / (centred.square().mean(axes, keepdim=True) + epsilon).sqrt()
    gamma = None if gamma is None else gamma.reshape(wide)
    return _affine(normed, gamma, None if beta is None else beta.reshape(wide))


def batch_norm(op: Operands) -> Tensor:
    """Per channel with stored statistics."""
    x = op.tensor()
    sides = (1, -1, *[1] * (x.ndim - 2))
    mean, variance = op.tensor("mean").reshape(sides), op.tensor("variance").reshape(sides)
    normed = (x - mean) / (variance + op.const("epsilon")).sqrt()
    return _affine(normed, _per_channel(op.maybe("gamma"), x), _per_channel(op.maybe("beta"), x))


def instance_norm(op: Operands) -> Tensor:
    """Per image and channel over the spatial axes, biased variance."""
    x = op.tensor()
    axes = list(range(2, x.ndim))
    centred = x - x.mean(axes, keepdim=True)
    normed = centred / (centred.square().mean(axes, keepdim=True) + op.const("epsilon")).sqrt()
    return _affine(normed, _per_channel(op.maybe("gamma"), x), _per_channel(op.maybe("beta"), x))


def l2_norm(op: Operands) -> Tensor:
    """x/sqrt(Σx² + epsilon) over the last three axes."""
    x = op.tensor()
    total = x.square().sum((-3, -2, -1), keepdim=True)
    return x / (total + op.const("epsilon")).sqrt()


def _nearest(x: Tensor, height: int, width: int) -> Tensor:
    for axis, wanted in ((-2, height), (-1, width)):
        places = torch.arange(wanted) * x.shape[axis] // wanted
        x = x.index_select(x.ndim + axis, places)
    return x


def upsample_nearest_neighbor(op: Operands) -> Tensor:
    """Nearest neighbour to the declared size: source place ⌊i·in/out⌋."""
    height, width = op.shape()[-2:]
    return _nearest(op.tensor(), height, width)


def _grid(size: int, wanted: int, mode: str) -> Tensor:
    """Source coordinates of one axis, float64, before clipping to 0..size − 1.

    Source: the notes of ``resize_bilinear`` in the MIL operation reference.
    """
    steps = torch.arange(wanted, dtype=torch.float64)
    if mode == "ALIGN_CORNERS" and wanted == 1:
        return steps + (size - 1) / 2
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        return steps * ((size - 1) / max(wanted - 1, 1))
    if mode == "DEFAULT":
        return steps * ((size - size / wanted) / max(wanted - 1, 1))
    if mode == "OFFSET_CORNERS":
        delta = max(1, size - 1) / wanted
        return 0.5 * delta + steps * delta
    return steps * (size / wanted) + 0.5 * (size / wanted) - 0.5


def _bilinear(x: Tensor, height: int, width: int, mode: str) -> Tensor:
    for axis, wanted in ((x.ndim - 2, height), (x.ndim - 1, width)):
        size = x.shape[axis]
        places = _grid(size, wanted, mode).clamp(0, size - 1)
        low = places.floor().long()
        high = (low + 1).clamp(max=size - 1)
        share = (places - low).to(x.dtype).reshape([-1] + [1] * (x.ndim - 1 - axis))
        x = x.index_select(axis, low) * (1 - share) + x.index_select(axis, high) * share
    return x


def upsample_bilinear(op: Operands) -> Tensor:
    """Bilinear to the declared size, with the scale recomputed from both sizes."""
    height, width = op.shape()[-2:]
    aligned = op.const("align_corners", True)
    mode = "STRICT_ALIGN_CORNERS" if aligned else "UNALIGN_CORNERS"
    return _bilinear(op.tensor(), height, width, mode)


def resize_bilinear(op: Operands) -> Tensor:
    """Bilinear to a target size by one of five sampling rules."""
    height, width = op.shape()[-2:]
    return _bilinear(op.tensor(), height, width, op.const("sampling_mode", "DEFAULT"))


LAYERS: dict[str, Kernel] = {
    "avg_pool": avg_pool,
    "batch_norm": batch_norm,
    "conv": conv,
    "conv_transpose": conv_transpose,
    "einsum": einsum,
    "instance_norm": instance_norm,
    "l2_norm": l2_norm,
    "layer_norm": layer_norm,
    "linear": linear,
    "matmul": matmul,
    "max_pool": max_pool,
    "resize_bilinear": resize_bilinear,
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "upsample_bilinear": upsample_bilinear,
    "upsample_nearest_neighbor": upsample_nearest_neighbor,
}
