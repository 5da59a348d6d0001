"""DINOv2's Vision Transformer, written to be exported: static shapes, attention in 4 dimensions.

Parameter names are those of the published hub checkpoints, so that they load without renaming.
Source: METHODS A1, A2, A5.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, cast

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinotrain.backbones.position import PositionRule, resample_position
from dinotrain.errors import ShapeError, UsageError

TapNorm = Literal["none", "final", "own_ln"]
"""``none``: block outputs as they are. ``final``: through the backbone's last LayerNorm.
``own_ln``: as ``none`` here, with one trained LayerNorm per tap in the head."""


_PUBLISHED_TAPS = {12: (2, 5, 8, 11), 24: (4, 11, 17, 23), 40: (9, 19, 29, 39)}


class ViTConfig(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    tag_field="kind",
    tag="vit",
):
    """The architecture of one backbone; ``grid`` is (rows, cols) of its position embedding."""

    name: str
    embed_dim: int
    depth: int
    heads: int
    ffn: Literal["gelu", "swiglu"] = "gelu"
    ffn_dim: int
    registers: int = 0
    patch_size: int = 14
    grid: tuple[int, int] = (37, 37)
    layer_norm_eps: float = 1e-6
    position_rule: PositionRule = "scale"

    @property
    def size_step(self) -> int:
        """Pixels that both sides of an image are a multiple of."""
        return self.patch_size

    @property
    def least_size(self) -> int:
        """Pixels of an image's side at least."""
        return self.patch_size

    @property
    def last_tap(self) -> int:
        """The deepest tap: the last block."""
        return self.depth - 1

    def default_taps(self, count: int) -> tuple[int, ...]:
        """Return the blocks that are read where none are named, shallow to deep.

        Four are the published ones or evenly spaced (METHODS A5), three a third, two thirds and all
        of the way (METHODS C: 3, 7, 11 of 12).

        Raises:
            UsageError: fewer blocks than taps.
        """
        if count == 4 and self.depth in _PUBLISHED_TAPS:
            return _PUBLISHED_TAPS[self.depth]
        if self.depth < count:
            raise UsageError(
                f"{count} taps need at least {count} blocks, {self.name} has {self.depth}. "
                "Choose a deeper backbone."
            )
        return tuple(self.depth * (part + 1) // count - 1 for part in range(count))

    def tap_width(self, tap: int) -> int:
        """Channels of a tap's map, or UsageError for a block that is not there."""
        if not 0 <= tap < self.depth:
            raise UsageError(
                f"tap block {tap} is outside {self.name}, which has blocks 0 to {self.depth - 1}"
            )
        return self.embed_dim

    def tap_grid(self, tap: int, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of a tap's map: all have those of the patches."""
        return image_size[0] // self.patch_size, image_size[1] // self.patch_size


def _variant(size: str, dim: int, depth: int, heads: int, registers: int) -> ViTConfig:
    swiglu = size == "g"
    return ViTConfig(
        name=f"dinov2_vit{size}14" + ("_reg" if registers else ""),
        embed_dim=dim,
        depth=depth,
        heads=heads,
        ffn="swiglu" if swiglu else "gelu",
        ffn_dim=swiglu_hidden_dim(dim) if swiglu else 4 * dim,
        registers=registers,
        position_rule="size_antialias" if registers else "scale",
    )


def swiglu_hidden_dim(embed_dim: int) -> int:
    """Return ⌈int(4D·2/3)/8⌉·8, the hidden width of DINOv2's SwiGLU. Source: METHODS A1."""
    return (int(4 * embed_dim * 2 / 3) + 7) // 8 * 8


VARIANTS: dict[str, ViTConfig] = {
    config.name: config
    for registers in (0, 4)
    for config in (
        _variant("s", 384, 12, 6, registers),
        _variant("b", 768, 12, 12, registers),
        _variant("l", 1024, 24, 16, registers),
        _variant("g", 1536, 40, 24, registers),
    )
}
"""The eight published variants by hub name."""


class BackboneOutput(NamedTuple):
    """Tokens after the final LayerNorm: (B, D), (B, R, D) and (B, N, D), patches row-major."""

    cls_token: Tensor
    register_tokens: Tensor
    patch_tokens: Tensor


class Attention(nn.Module):
    """Multi-head self-attention over (B, T, D), at most four dimensions at any point."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        batch, tokens, dim = x.shape
        head_dim = dim // self.heads
        q, k, v = (
            part.reshape(batch, tokens, self.heads, head_dim).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, dim))


class GeluMlp(nn.Module):
    """fc2(gelu(fc1 x)) with the exact (erf) GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class SwigluMlp(nn.Module):
    """w3(silu(x1) ⊙ x2) with (x1, x2) = w12 x."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """Multiply each channel by a learned factor."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        return x * self.gamma


class Block(nn.Module):
    """x += ls1·attn(norm1 x); x += ls2·mlp(norm2 x)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        dim, eps = config.embed_dim, config.layer_norm_eps
        mlp = SwigluMlp if config.ffn == "swiglu" else GeluMlp
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, config.heads)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = mlp(dim, config.ffn_dim)
        self.ls2 = LayerScale(dim)

    def attend(self, x: Tensor) -> Tensor:
        """First half: the residual stream after attention, (B, T, D) → (B, T, D)."""
        return x + self.ls1(self.attn(self.norm1(x)))

    def feed(self, x: Tensor) -> Tensor:
        """Second half: the residual stream after the MLP, (B, T, D) → (B, T, D)."""
        return x + self.ls2(self.mlp(self.norm2(x)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        return self.feed(self.attend(x))


class PatchEmbed(nn.Module):
    """One convolution whose stride is the patch size; (B, 3, H, W) → (B, N, D), row-major."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.proj = nn.Conv2d(3, config.embed_dim, kernel_size=size, stride=size)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, N, D)."""
        # Channels last and only then one axis: converters of channels-last formats move nothing.
        return self.proj(images).permute(0, 2, 3, 1).flatten(1, 2)


class VisionTransformer(nn.Module):
    """DINOv2 backbone; images in are (B, 3, H, W) float32, ImageNet-normalised.

    Token order: CLS, registers, patches row-major (METHODS A2).
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid[0] * config.grid[1], dim))
        if config.registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.registers, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)

    def grid_for(self, height: int, width: int) -> tuple[int, int]:
        """Patch rows and columns of an image, or ShapeError unless both sides divide."""
        patch = self.config.patch_size
        check_multiple((height, width), patch)
        return height // patch, width // patch

    def position(self, grid: tuple[int, int]) -> Tensor:
        """Position embedding of the patches at a grid, (1, N, D), by the checkpoint's rule."""
        return resample_position(
            self.pos_embed[:, 1:], self.config.grid, grid, self.config.position_rule
        )

    def prefix(self) -> Tensor:
        """CLS with its position, then registers without: (1, 1 + R, D)."""
        cls_token = self.cls_token + self.pos_embed[:, :1]
        if not self.config.registers:
            return cls_token
        return torch.cat((cls_token, self.register_tokens), dim=1)

    def tokens(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Embed images: (B, 3, H, W) → (B, 1 + R + N, D).

        Args:
            images: (B, 3, H, W) float32, ImageNet-normalised.
            mask: (B, N) bool, True where the mask token replaces a patch (SSL only).
        """
        grid = self.grid_for(images.shape[-2], images.shape[-1])
        patches = self.patch_embed(images)
        if mask is not None:
            patches = torch.where(mask.unsqueeze(-1), self.mask_token.to(patches.dtype), patches)
        patches = patches + self.position(grid)
        prefix = self.prefix().expand(images.shape[0], -1, -1)
        return torch.cat((prefix, patches), dim=1)

    def split(self, tokens: Tensor) -> BackboneOutput:
        """Split (B, 1 + R + N, D) into CLS, registers and patches."""
        first = 1 + self.config.registers
        return BackboneOutput(tokens[:, 0], tokens[:, 1:first], tokens[:, first:])

    def forward(self, images: Tensor, mask: Tensor | None = None) -> BackboneOutput:
        """(B, 3, H, W) float32, normalised → tokens after the final LayerNorm."""
        x = tokens = self.tokens(images, mask)
        for _index, x in self.run_blocks(tokens):  # noqa: B007 (the last output is wanted)
            pass
        return self.split(self.norm(x))

    def run_blocks(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(B, T, D) → after each block its number and output, (B, T, D)."""
        for index, block in enumerate(self.blocks):
            x = block(x)
            yield index, x

    def forward_taps(
        self, images: Tensor, blocks: Sequence[int], norm: TapNorm = "final"
    ) -> tuple[BackboneOutput, list[Tensor]]:
        """One pass that gives the final tokens and the patch tokens of some blocks.

        Args:
            images: (B, 3, H, W) float32, ImageNet-normalised.
            blocks: 0-based block numbers, in the order wanted.
            norm: ``final`` applies the backbone's last LayerNorm to every tap.

        Returns:
            The final output, and one (B, N, D) tensor per entry of ``blocks``.

        Raises:
            UsageError: a block number outside the backbone.
        """
        for block in blocks:
            self.config.tap_width(block)
        if norm not in ("none", "final", "own_ln"):
            raise UsageError(f"unknown tap norm '{norm}'. Known: none, final, own_ln.")
        x = tokens = self.tokens(images)
        found: dict[int, Tensor] = {}
        for index, x in self.run_blocks(tokens):
            if index in blocks:
                found[index] = self.split(self.norm(x) if norm == "final" else x).patch_tokens
        return self.split(self.norm(x)), [found[block] for block in blocks]

    def taps(self, images: Tensor, blocks: Sequence[int], norm: TapNorm = "final") -> list[Tensor]:
        """Patch tokens per block: a list of (B, N, D). See ``forward_taps``."""
        return self.forward_taps(images, blocks, norm)[1]

    def maps(self, images: Tensor, blocks: Sequence[int], norm: TapNorm = "final") -> list[Tensor]:
        """Patch tokens per block as maps: a list of (B, D, rows, cols). See ``forward_taps``."""
        grid = self.grid_for(images.shape[-2], images.shape[-1])
        return [tokens_to_map(tap, grid) for tap in self.taps(images, blocks, norm)]

    def trace(self, images: Tensor, last: int | None) -> Iterator[tuple[str, Tensor]]:
        """Give the residual stream with names: the tokens, and twice per block.

        Args:
            images: (B, 3, H, W) float32, normalised.
            last: the deepest block that is read; None reads the final output.

        What a deploy graph computes is compared with these, name by name.
        """
        x = self.tokens(images)
        yield "tokens", x
        count = self.config.depth if last is None else last + 1
        for index, block in enumerate(cast("list[Block]", self.blocks[:count])):
            x = block.attend(x)
            yield f"blocks.{index}.attn", x
            x = block.feed(x)
            yield f"blocks.{index}.mlp", x


def check_multiple(image_size: tuple[int, int], patch: int) -> None:
    """Refuse an image, (height, width), whose sides are no multiples of the patch size."""
    height, width = image_size
    if height % patch or width % patch or min(height, width) < patch:
        near = max(round(height / patch), 1) * patch, max(round(width / patch), 1) * patch
        raise ShapeError(
            f"image size {height}×{width} is not a multiple of the patch size {patch}. "
            f"Use {near[0]}×{near[1]}."
        )


def tokens_to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, rows·cols, D) patch tokens, row-major → (B, D, rows, cols)."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *grid)


def map_to_tokens(maps: Tensor) -> Tensor:
    """(B, D, rows, cols) → (B, rows·cols, D) tokens, row-major."""
    return maps.flatten(2).transpose(1, 2)


def init_weights_(model: VisionTransformer, layer_scale: float = 1.0) -> VisionTransformer:
    """Initialise a backbone for training from scratch, in place (uses torch's global seed)."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, LayerScale):
            nn.init.constant_(module.gamma, layer_scale)
    nn.init.trunc_normal_(model.pos_embed, std=0.02)
    nn.init.normal_(model.cls_token, std=1e-6)
    if model.config.registers:
        nn.init.normal_(model.register_tokens, std=1e-6)
    return model
