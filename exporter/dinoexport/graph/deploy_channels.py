"""A ViT in (B, C, 1, T), the layout that Apple's Neural Engine works in: linear layers are 1×1
convolutions, and attention runs over chunks of queries.

Source: Apple, "Deploying Transformers on the Apple Neural Engine" (2022).
"""

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoexport.graph.deploy_backbones import DeployViT
from dinoexport.graph.deploy_blocks import DeployBlock, PlainAttention
from dinoexport.graph.deploy_norms import ChannelNorm, SafeNorm
from dinotrain.backbones.vit import SwigluMlp

CHUNK = 512
"""Queries at most that are attended with at once: scores of all 1370 of an image of 518 pixels do
not fit beside the weights into the engine's memory."""
CHANNEL_AXIS, TOKEN_AXIS = 1, 3


class ChannelsViT(DeployViT):
    """A DeployViT whose tokens are columns; what it gives to pools is rows again.

    Args:
        vit: behind all other passes; taken apart.
    """

    def __init__(self, vit: DeployViT) -> None:
        nn.Module.__init__(self)
        prefix, position = vit.constants()
        self.config, self.grid, self.prefix_count = vit.config, vit.grid, vit.prefix_count
        self.normalise, self.patch_embed, self.norm = vit.normalise, vit.patch_embed, vit.norm
        self.embedding = None
        self.prefix = nn.Parameter(_columns(prefix)[:, :, 0], requires_grad=False)
        self.position = nn.Parameter(_columns(position), requires_grad=False)
        self.blocks = vit.blocks
        for block in cast("list[DeployBlock]", self.blocks):
            _turn_(block)
        self.record: dict[str, Tensor] = {}

    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), 0..255 → (B, D, 1, 1 + R + N)."""
        prefix, position = self.constants()
        patches = self.patch_embed.proj(self.normalise(images)).flatten(2).unsqueeze(2) + position
        # Expanded in three dimensions: of four, litert-torch writes a file that does not load.
        first = prefix.expand(images.shape[0], -1, -1).unsqueeze(2)
        x = torch.cat((first, patches), dim=TOKEN_AXIS)
        self.record["tokens"] = x
        return x

    def run_blocks(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(B, D, 1, T) → after each block its number and output as rows, (B, T, D)."""
        for index, columns in super().run_blocks(x):
            yield index, columns.squeeze(2).transpose(1, 2)


class ChannelAttention(nn.Module):
    """PlainAttention of columns.

    Args:
        attention: its scale is folded.
    """

    def __init__(self, attention: PlainAttention) -> None:
        super().__init__()
        self.heads = attention.heads
        self.q, self.k = convolution(attention.q), convolution(attention.k)
        self.v, self.proj = convolution(attention.v), convolution(attention.proj)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """Attend from tokens to tokens.

        Args:
            x: (B, D, 1, Q), what queries are made of.
            memory: (B, D, 1, T), what keys and values are made of; None for x.

        Returns:
            (B, D, 1, Q).
        """
        memory = x if memory is None else memory
        batch, dim, _, count = x.shape
        q, k, v = (
            part.reshape(batch, self.heads, dim // self.heads, part.shape[TOKEN_AXIS])
            for part in (self.q(x), self.k(memory), self.v(memory))
        )
        chunks = -(-count // CHUNK)
        size = -(-count // chunks)
        if chunks > 1:
            # Zeros behind the last query make all chunks equal, so that one program serves them.
            q = F.pad(q, (0, chunks * size - count))
        parts = q.split(size, dim=-1) if chunks > 1 else (q,)
        mixed = [v @ (p.transpose(2, 3) @ k).softmax(dim=-1).transpose(2, 3) for p in parts]
        joined = torch.cat(mixed, dim=-1)[..., :count] if chunks > 1 else mixed[0]
        return self.proj(joined.reshape(batch, dim, 1, count))


class ChannelSwiglu(nn.Module):
    """SwigluMlp of columns."""

    def __init__(self, mlp: SwigluMlp) -> None:
        super().__init__()
        self.w12, self.w3 = convolution(mlp.w12), convolution(mlp.w3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, 1, T) → the same."""
        gate, value = self.w12(x).chunk(2, dim=CHANNEL_AXIS)
        return self.w3(F.silu(gate) * value)


def convolution(linear: nn.Linear) -> nn.Conv2d:
    """Return the 1×1 convolution that does to columns what a linear layer does to rows."""
    weight = linear.weight
    conv = nn.Conv2d(
        linear.in_features, linear.out_features, 1, device=weight.device, dtype=weight.dtype
    )
    conv.weight = nn.Parameter(weight[:, :, None, None].clone(), requires_grad=False)
    conv.bias = nn.Parameter(linear.bias.clone(), requires_grad=False)
    return conv


def _turn_(block: DeployBlock) -> None:
    """Bring a block to columns, in place."""
    for name in ("norm1", "norm2"):
        norm = getattr(block, name)
        kind = SafeNorm if isinstance(norm, SafeNorm) else ChannelNorm
        setattr(block, name, kind(norm, CHANNEL_AXIS))
    block.attn = ChannelAttention(cast("PlainAttention", block.attn))
    if isinstance(block.mlp, SwigluMlp):
        block.mlp = ChannelSwiglu(block.mlp)
    else:
        for name in ("fc1", "fc2"):
            setattr(block.mlp, name, convolution(getattr(block.mlp, name)))
    block.token_axis = TOKEN_AXIS


def _columns(rows: Tensor) -> Tensor:
    """(1, T, D) → (1, D, 1, T)."""
    return rows.detach().transpose(1, 2).unsqueeze(2).clone(memory_format=torch.contiguous_format)
