"""The module that is captured: pixels 0..255 in, named values in their units out.

Built from a trained TaskModel: mean and std are folded into the patch convolution, the position
embedding is baked at the export size, and blocks after the last one that is read are dropped.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dinoexport.errors import BuildError
from dinotrain.backbones.vit import Block, TapNorm, VisionTransformer
from dinotrain.model import TaskModel


class DeployBackbone(nn.Module):
    """A VisionTransformer at one image size, with normalisation folded in; records its taps."""

    def __init__(self, backbone: VisionTransformer, model: TaskModel) -> None:
        super().__init__()
        self.config = backbone.config
        last = model.pool.last_block(backbone.config.depth)
        self.patch_embed = copy.deepcopy(backbone.patch_embed)
        fold_normalisation_(self.patch_embed.proj, model.pixel_mean, model.pixel_std)
        grid = backbone.grid_for(*model.config.image_size)
        self.prefix = nn.Parameter(backbone.prefix().detach().clone(), requires_grad=False)
        self.position = nn.Parameter(backbone.position(grid).detach().clone(), requires_grad=False)
        self.blocks = copy.deepcopy(backbone.blocks[: last + 1])
        for block in self.blocks:
            fold_scales_(block)
        self.norm = copy.deepcopy(backbone.norm)
        self.record: dict[str, Tensor] = {}

    split = VisionTransformer.split
    forward = VisionTransformer.forward

    def tokens(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
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

    def taps(self, images: Tensor, blocks: Sequence[int], norm: TapNorm = "final") -> list[Tensor]:
        """As the training backbone's, without the final tokens, which no pool over taps reads."""
        found: dict[int, Tensor] = {}
        for index, x in self.run_blocks(self.tokens(images)):
            if index in blocks:
                found[index] = self.split(self.norm(x) if norm == "final" else x).patch_tokens
        return [found[block] for block in blocks]


class DeployModel(nn.Module):
    """One image tensor per input of the task → one tensor per output, then the taps if asked.

    Args:
        model: trained, eval mode; copied, never changed.
        debug: also return every tap, in the order of ``tap_names``.
    """

    def __init__(self, model: TaskModel, debug: bool = False) -> None:
        super().__init__()
        self.debug = debug
        self.image_size = model.config.image_size
        self.task = model.task
        self.input_names = [i.name for i in model.task.inputs]
        self.output_names = [output.name for output in model.task.outputs(model.config)]
        self.backbone = DeployBackbone(model.backbone, model)
        self.pool = copy.deepcopy(model.pool)
        self.head = copy.deepcopy(model.head)
        self.decoder = copy.deepcopy(model.decoder)
        self.eval().requires_grad_(False)

    @property
    def tap_names(self) -> list[str]:
        """Taps in the order in which they are computed."""
        names = ["tokens"]
        for index in range(len(self.backbone.blocks)):
            names += [f"blocks.{index}.attn", f"blocks.{index}.mlp"]
        return [*names, "features"]

    def run(self, pixels: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Outputs and taps by name; one (1, 3, H, W) tensor of 0..255 per input."""
        record = self.backbone.record
        record.clear()
        pooled = self.pool(self.pool.extract(self.backbone, torch.cat(pixels, dim=0)))  # type: ignore[arg-type]
        record["features"] = pooled
        by_input = {name: pooled[index : index + 1] for index, name in enumerate(self.input_names)}
        logits = self.head(self.task.combine(by_input))
        taps = {name: record[name] for name in self.tap_names}
        record.clear()
        return self.decoder(logits), taps

    def forward(self, *pixels: Tensor) -> tuple[Tensor, ...]:
        """Outputs in the order of ``output_names``; with ``debug`` the taps behind them."""
        outputs, taps = self.run(pixels)
        values = tuple(outputs[name] for name in self.output_names)
        return values + tuple(taps.values()) if self.debug else values


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
        norm = getattr(block, name)
        linear.bias.add_(linear.weight @ norm.bias)
        linear.weight.mul_(norm.weight)
        plain = nn.LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)
        setattr(block, name, plain)
    for name, linear in (("ls1", block.attn.proj), ("ls2", last)):
        scale = getattr(block, name).gamma
        linear.weight.mul_(scale[:, None])
        linear.bias.mul_(scale)
        setattr(block, name, nn.Identity())


@torch.no_grad()
def round_weights_(model: DeployModel, precision: str) -> DeployModel:
    """Round all weights to what a precision can hold, in place; the decoder keeps float32.

    Raises:
        BuildError: a weight does not fit into half precision.
    """
    if precision == "fp32":
        return model
    for name, weight in model.named_parameters():
        rounded = weight.half().float()
        if not bool(rounded.isfinite().all()):
            raise BuildError(
                f"{name} holds {float(weight.abs().max()):.3g}, half precision ends at 65504. "
                "Build with --precision fp32."
            )
        weight.copy_(rounded)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            # Core ML stores epsilon in half precision too: 1e-6 becomes 1.0133e-6.
            module.eps = float(torch.tensor(module.eps).half())
    return model
