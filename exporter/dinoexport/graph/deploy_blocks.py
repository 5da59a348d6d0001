"""A ViT's block and attention as passes find them and leave them; layers keep the names that they
have in a checkpoint, because recipes and faults are named by them.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinotrain.backbones.vit import Attention, Block


class DeployBlock(nn.Module):
    """A copy of a training block: x += ls1·attn(norm1 x); x += ls2·mlp(norm2 x).

    Attributes:
        rows: tokens that are computed, from the first one on; None for all. Keys and values are of
            all tokens in either case.
        token_axis: of x, which is (B, T, D) unless a pass changed the layout.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm1 = copy.deepcopy(block.norm1)
        self.attn: nn.Module = copy.deepcopy(block.attn)
        self.ls1: nn.Module = copy.deepcopy(block.ls1)
        self.norm2 = copy.deepcopy(block.norm2)
        self.mlp: nn.Module = copy.deepcopy(block.mlp)
        self.ls2: nn.Module = copy.deepcopy(block.ls2)
        self.rows: int | None = None
        self.token_axis = 1

    def attend(self, x: Tensor) -> Tensor:
        """First half: the residual stream after attention, (B, T, D) → (B, rows, D)."""
        read = self.norm1(x)
        if self.rows is None:
            return x + self.ls1(self.attn(read))
        return self._first(x) + self.ls1(self.attn(self._first(read), read))

    def feed(self, x: Tensor) -> Tensor:
        """Second half: the residual stream after the MLP, (B, rows, D) → the same."""
        return x + self.ls2(self.mlp(self.norm2(x)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, rows, D)."""
        return self.feed(self.attend(x))

    def _first(self, x: Tensor) -> Tensor:
        return x.narrow(self.token_axis, 0, self.rows or 0)


class SplitAttention(nn.Module):
    """Attention whose queries, keys and values come from a linear layer each.

    Args:
        attention: with one layer for all three; copied.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.heads = attention.heads
        self.q, self.k, self.v = _thirds(attention.qkv)
        self.proj = copy.deepcopy(attention.proj)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """Attend from tokens to tokens, at most four dimensions at any point.

        Args:
            x: (B, Q, D), what queries are made of.
            memory: (B, T, D), what keys and values are made of; None for x.

        Returns:
            (B, Q, D).
        """
        memory = x if memory is None else memory
        batch, count, dim = x.shape
        q, k, v = (
            part.reshape(batch, part.shape[1], self.heads, dim // self.heads).transpose(1, 2)
            for part in (self.q(x), self.k(memory), self.v(memory))
        )
        return self.proj(self.mix(q, k, v).transpose(1, 2).reshape(batch, count, dim))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, heads, Q, d), (B, heads, T, d) twice → (B, heads, Q, d)."""
        return F.scaled_dot_product_attention(q, k, v)


class PlainAttention(SplitAttention):
    """Attention in plain products: a lowered SDPA carries NaN guards that delegates refuse.

    Args:
        attention: its layers are taken over.
    """

    def __init__(self, attention: SplitAttention) -> None:
        nn.Module.__init__(self)
        self.heads = attention.heads
        self.q, self.k, self.v = attention.q, attention.k, attention.v
        self.proj = attention.proj
        self.scale = (attention.q.out_features // attention.heads) ** -0.5
        self.fused = False
        """Compute the same by torch's kernel, where nothing is captured (``fused_attention``)."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, heads, Q, d), (B, heads, T, d) twice → (B, heads, Q, d)."""
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        if self.scale != 1:
            q = q * self.scale
        return (q @ k.transpose(-2, -1)).softmax(dim=-1) @ v


@torch.no_grad()
def _thirds(layer: nn.Linear) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """Split a linear layer by its outputs into three, in their order."""
    parts = []
    for weight, bias in zip(layer.weight.chunk(3), layer.bias.chunk(3), strict=True):
        outs, ins = weight.shape
        part = nn.Linear(ins, outs, device=weight.device, dtype=weight.dtype)
        part.weight.copy_(weight)
        part.bias.copy_(bias)
        parts.append(part.requires_grad_(False))
    return parts[0], parts[1], parts[2]
