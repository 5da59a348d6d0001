"""Which linear layers of a ViT's blocks read one tensor, and where its channels can be divided.

All that quantisation knows of how a block is built stands here.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Divide = Callable[[Tensor], None]


@dataclass(frozen=True)
class Link:
    """A tensor between two parts of a block.

    Attributes:
        name: of what gives it, such as ``blocks.5.norm2``.
        readers: linear layers that read it, by name; nothing else does.
        divide: divides each of its channels, in place, by a factor: (channels,) float32.
        free: False where ``divide`` adds an operation.
    """

    name: str
    readers: tuple[str, ...]
    divide: Divide
    free: bool = True


class ScaledGeluMlp(nn.Module):
    """fc2(factor · gelu(fc1 x)): no layer before an activation can divide what it gives.

    Args:
        mlp: whose layers are taken over.
        factor: (hidden,).
    """

    def __init__(self, mlp: Any, factor: Tensor) -> None:
        super().__init__()
        self.fc1: nn.Module = mlp.fc1
        self.factor = nn.Parameter(factor, requires_grad=False)
        self.fc2: nn.Module = mlp.fc2

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        return self.fc2(F.gelu(self.fc1(x)) * self.factor)


def block_links(model: nn.Module) -> list[Link]:
    """Return the links of a deploy model's blocks in running order; none without blocks."""
    blocks = getattr(getattr(model, "backbone", None), "blocks", ())
    return [link for index, block in enumerate(blocks) for link in _links(f"blocks.{index}", block)]


def _links(name: str, block: Any) -> Iterator[Link]:
    attention, mlp = block.attn, block.mlp
    norm1, norm2 = block.norm1, block.norm2
    if not isinstance(attention.proj, nn.Linear):
        # Columns of tokens are multiplied by convolutions, whose activations stay float.
        return
    if hasattr(attention, "qkv"):
        width = attention.qkv.out_features // 3
        readers, values = ("qkv",), _divide_rows(attention.qkv, 2 * width)
    else:
        readers, values = ("q", "k", "v"), _divide_rows(attention.v)
    yield Link(f"{name}.norm1", _within(f"{name}.attn", *readers), _divide_norm(norm1))
    # Attention mixes tokens and leaves channels apart: a factor of a value's channel passes it.
    yield Link(f"{name}.attn.v", (f"{name}.attn.proj",), values)
    if hasattr(mlp, "w12"):
        hidden = mlp.w12.out_features // 2
        yield Link(f"{name}.norm2", (f"{name}.mlp.w12",), _divide_norm(norm2))
        # silu(gate) · value: the value's half is a factor of what comes out.
        yield Link(f"{name}.mlp.w12", (f"{name}.mlp.w3",), _divide_rows(mlp.w12, hidden))
        return
    yield Link(f"{name}.norm2", (f"{name}.mlp.fc1",), _divide_norm(norm2))
    yield Link(f"{name}.mlp.gelu", (f"{name}.mlp.fc2",), _divide_gelu(block), free=False)


def _within(parent: str, *children: str) -> tuple[str, ...]:
    return tuple(f"{parent}.{child}" for child in children)


def _divide_norm(norm: nn.LayerNorm) -> Divide:
    @torch.no_grad()
    def divide(factor: Tensor) -> None:
        if norm.weight is not None:
            norm.weight.div_(factor)
            if norm.bias is not None:
                norm.bias.div_(factor)
            return
        norm.elementwise_affine = True
        norm.weight = nn.Parameter(1 / factor, requires_grad=False)
        if type(norm) is not nn.LayerNorm:
            # Norms that are written out have both or none.
            norm.bias = nn.Parameter(torch.zeros_like(factor), requires_grad=False)

    return divide


def _divide_rows(layer: nn.Linear, start: int = 0) -> Divide:
    @torch.no_grad()
    def divide(factor: Tensor) -> None:
        layer.weight[start:].div_(factor[:, None])
        if layer.bias is not None:
            layer.bias[start:].div_(factor)

    return divide


def _divide_gelu(block: Any) -> Divide:
    @torch.no_grad()
    def divide(factor: Tensor) -> None:
        if isinstance(block.mlp, ScaledGeluMlp):
            block.mlp.factor.div_(factor)
        else:
            block.mlp = ScaledGeluMlp(block.mlp, 1 / factor)

    return divide
