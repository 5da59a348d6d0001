"""Backbones as they are captured: pixels 0..255 in, normalisation folded, unread layers dropped.

Each records its taps while it runs and offers what pools read of a training backbone. A new family
is one class here.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dinoexport.graph.deploy_heads import fold_affine
from dinotrain.backbones.convnets.backbone import ConvNet
from dinotrain.backbones.convnets.folding import fold_batch_norms
from dinotrain.backbones.vit import Block, TapNorm, VisionTransformer, tokens_to_map
from dinotrain.model import TaskModel


def deploy_backbone(model: TaskModel) -> "DeployViT | DeployConvNet":
    """Return a copy of a model's backbone in the form that is captured."""
    if isinstance(model.backbone, ConvNet):
        return DeployConvNet(model.backbone, model)
    return DeployViT(model.backbone, model)


class DeployViT(nn.Module):
    """A VisionTransformer at one image size: mean and std are folded into the patch convolution,
    the position embedding is baked, and blocks after the last one that is read are dropped.
    """

    def __init__(self, backbone: VisionTransformer, model: TaskModel) -> None:
        super().__init__()
        self.config = backbone.config
        deepest = model.pool.deepest
        last = backbone.config.last_tap if deepest is None else deepest
        self.patch_embed = copy.deepcopy(backbone.patch_embed)
        fold_normalisation_(self.patch_embed.proj, model.pixel_mean, model.pixel_std)
        self.grid = backbone.grid_for(*model.config.image_size)
        self.prefix = nn.Parameter(backbone.prefix().detach().clone(), requires_grad=False)
        position = backbone.position(self.grid).detach().clone()
        self.position = nn.Parameter(position, requires_grad=False)
        self.blocks = copy.deepcopy(backbone.blocks[: last + 1])
        for block in self.blocks:
            fold_scales_(block)
        self.norm = copy.deepcopy(backbone.norm)
        self.prefix_count = self.prefix.shape[1]
        self.record: dict[str, Tensor] = {}

    split = VisionTransformer.split

    @property
    def tap_names(self) -> list[str]:
        """Taps in running order."""
        halves = [(f"blocks.{i}.attn", f"blocks.{i}.mlp") for i in range(len(self.blocks))]
        return ["tokens", *(name for pair in halves for name in pair)]

    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), 0..255 → (B, 1 + R + N, D)."""
        patches = self.patch_embed(images) + self.position
        x = torch.cat((self.prefix.expand(images.shape[0], -1, -1), patches), dim=1)
        self.record["tokens"] = x
        return x

    def run_blocks(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """As the training backbone's, recording the residual stream twice per block."""
        for index, block in enumerate(cast("list[Block]", self.blocks)):
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
    """A ConvNet: BatchNorm is folded, std too; the mean is taken off each pixel, because zeros are
    padded around normalised images; stages after the last one that is read are dropped.
    """

    def __init__(self, backbone: ConvNet, model: TaskModel) -> None:
        super().__init__()
        self.config = backbone.config
        self.net = fold_batch_norms(backbone)
        fold_scale_(self.net.first_convolution(), model.pixel_std)
        # A parameter, so that it is rounded as an artifact stores it.
        self.pixel_mean = nn.Parameter(model.pixel_mean * 255, requires_grad=False)
        self.deepest = model.pool.deepest
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
        for name, x in self.net.trace(images - self.pixel_mean, self.deepest):
            self.record[name] = x
        return x


@torch.no_grad()
def fold_scale_(conv: nn.Conv2d, std: Tensor) -> None:
    """Make a convolution read 255·x instead of x/std, in place.

    Args:
        conv: reads (x − mean)/std, of pixels in 0..1.
        std: (1, 3, 1, 1).
    """
    conv.weight.copy_(conv.weight.double() / (255 * std.double()))


@torch.no_grad()
def fold_normalisation_(conv: nn.Conv2d, mean: Tensor, std: Tensor) -> None:
    """Make a convolution without padding read 0..255 pixels instead of normalised ones, in place.

    Args:
        conv: reads (x/255 − mean)/std.
        mean: (1, 3, 1, 1), of pixels in 0..1.
        std: (1, 3, 1, 1).
    """
    weight = conv.weight.double()
    bias = conv.bias.double() - (weight * (mean / std).double()).sum(dim=(1, 2, 3))  # type: ignore[union-attr]
    conv.weight.copy_(weight / (255 * std.double()))
    conv.bias.copy_(bias)  # type: ignore[union-attr]


@torch.no_grad()
def fold_scales_(block: Any) -> None:
    """Fold a block's LayerNorm affine and LayerScale into the linear layers beside them, in place.

    litert-torch folds both by itself, after the weights were rounded (measured: the structural
    SQNR of an fp16 file fell from 125 to 70 dB). Folded here first, all targets round the same
    products.
    """
    first, last = (
        (block.mlp.fc1, block.mlp.fc2)
        if hasattr(block.mlp, "fc1")
        else (block.mlp.w12, block.mlp.w3)
    )
    for name, linear in (("norm1", block.attn.qkv), ("norm2", first)):
        setattr(block, name, fold_affine(getattr(block, name), [linear]))
    for name, linear in (("ls1", block.attn.proj), ("ls2", last)):
        scale = getattr(block, name).gamma
        linear.weight.mul_(scale[:, None])
        linear.bias.mul_(scale)
        setattr(block, name, nn.Identity())
