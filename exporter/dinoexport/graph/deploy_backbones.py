"""Backbones as they are captured: pixels 0..255 in, taps recorded on the way.

Each starts as a plain copy of the training backbone at one image size, and the passes bring it to
what ships. It offers what pools read of a training backbone. A new family is one class here.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dinoexport.graph.deploy_blocks import DeployBlock
from dinotrain.backbones.convnets.backbone import ConvNet
from dinotrain.backbones.vit import Block, TapNorm, VisionTransformer, tokens_to_map
from dinotrain.model import TaskModel


def deploy_backbone(model: TaskModel) -> "DeployViT | DeployConvNet":
    """Return a copy of a model's backbone in the form that passes rewrite."""
    if isinstance(model.backbone, ConvNet):
        return DeployConvNet(model.backbone, model)
    return DeployViT(model.backbone, model)


class Normalise(nn.Module):
    """(x/255 − mean)/std of pixels x in 0..255; mean, std: (1, 3, 1, 1), of pixels in 0..1."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("pixel_mean", mean.clone())
        self.register_buffer("pixel_std", std.clone())

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) → the same."""
        return (pixels / 255 - self.pixel_mean) / self.pixel_std


class Embedding(nn.Module):
    """CLS, registers and the position embedding as they are trained, resampled when they run."""

    prefix = VisionTransformer.prefix
    position = VisionTransformer.position

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__()
        self.config = backbone.config
        self.cls_token = copy.deepcopy(backbone.cls_token)
        self.pos_embed = copy.deepcopy(backbone.pos_embed)
        if backbone.config.registers:
            self.register_tokens = copy.deepcopy(backbone.register_tokens)


class DeployViT(nn.Module):
    """A VisionTransformer at one image size.

    Attributes:
        embedding: gives prefix and position where these are not constants yet, else None.
        prefix: (1, 1 + R, D), CLS with its position, then the registers.
        position: (1, N, D).
    """

    prefix: nn.Parameter | None
    position: nn.Parameter | None

    def __init__(self, backbone: VisionTransformer, model: TaskModel) -> None:
        super().__init__()
        self.config = backbone.config
        self.grid = backbone.grid_for(*model.config.image_size)
        self.normalise: nn.Module = Normalise(model.pixel_mean, model.pixel_std)
        self.patch_embed = copy.deepcopy(backbone.patch_embed)
        self.embedding: Embedding | None = Embedding(backbone)
        self.register_parameter("prefix", None)
        self.register_parameter("position", None)
        self.blocks = nn.ModuleList(DeployBlock(b) for b in cast("list[Block]", backbone.blocks))
        self.norm = copy.deepcopy(backbone.norm)
        self.prefix_count = 1 + backbone.config.registers
        self.record: dict[str, Tensor] = {}

    split = VisionTransformer.split

    @property
    def tap_names(self) -> list[str]:
        """Taps in running order."""
        halves = [(f"blocks.{i}.attn", f"blocks.{i}.mlp") for i in range(len(self.blocks))]
        return ["tokens", *(name for pair in halves for name in pair)]

    def constants(self) -> tuple[Tensor, Tensor]:
        """Prefix, (1, 1 + R, D), and position, (1, N, D)."""
        if self.prefix is not None and self.position is not None:
            return self.prefix, self.position
        embedding = cast("Embedding", self.embedding)
        return embedding.prefix(), embedding.position(self.grid)

    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), 0..255 → (B, 1 + R + N, D)."""
        prefix, position = self.constants()
        patches = self.patch_embed(self.normalise(images)) + position
        x = torch.cat((prefix.expand(images.shape[0], -1, -1), patches), dim=1)
        self.record["tokens"] = x
        return x

    def run_blocks(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """As the training backbone's, recording the residual stream twice per block."""
        for index, block in enumerate(cast("list[DeployBlock]", self.blocks)):
            x = block.attend(x)
            self.record[f"blocks.{index}.attn"] = x
            x = block.feed(x)
            self.record[f"blocks.{index}.mlp"] = x
            yield index, x

    def maps(self, images: Tensor, blocks: Sequence[int], norm: TapNorm = "final") -> list[Tensor]:
        """As the training backbone's, without the final tokens, which no pool over taps reads."""
        found: dict[int, Tensor] = {}
        for index, x in self.run_blocks(self.tokens(images)):
            if index in blocks:
                tokens = self.split(self.norm(x) if norm == "final" else x).patch_tokens  # type: ignore[arg-type]
                found[index] = tokens_to_map(tokens, self.grid)
        return [found[block] for block in blocks]


class DeployConvNet(nn.Module):
    """A ConvNet; ``deepest`` is the stride of the last stage that runs, None for the whole net."""

    def __init__(self, backbone: ConvNet, model: TaskModel) -> None:
        super().__init__()
        self.config = backbone.config
        self.normalise: nn.Module = Normalise(model.pixel_mean, model.pixel_std)
        self.net = copy.deepcopy(backbone)
        self.deepest: int | None = None
        self.prefix_count = 0
        self.record: dict[str, Tensor] = {}

    @property
    def tap_names(self) -> list[str]:
        """Taps in running order."""
        return self.net.trace_names(self.deepest)

    def maps(self, images: Tensor, strides: Sequence[int], norm: TapNorm = "none") -> list[Tensor]:
        """As the training backbone's."""
        self._run(images)
        stages = self.config.tap_stages
        return [self.record[self.net.stage_end(stages[stride])] for stride in strides]

    def pooled(self, images: Tensor) -> Tensor:
        """As the training backbone's."""
        return self._run(images).mean(dim=(2, 3))

    def _run(self, images: Tensor) -> Tensor:
        x = images
        for name, x in self.net.trace(self.normalise(images), self.deepest):
            self.record[name] = x
        return x
