"""What every convolutional backbone can do: taps, a pooled output, and frozen statistics.

Heads and pyramids read it as they read ``vit.py``'s tokens, as maps in place of tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dinotrain.backbones.convnets.config import TAP_STRIDES, ConvNetConfig
from dinotrain.backbones.convnets.layers import BatchNorm
from dinotrain.backbones.vit import TapNorm
from dinotrain.errors import ShapeError, UsageError

MIN_SIZE = 32
"""The largest stride, in pixels."""


class ConvNetOutput(NamedTuple):
    """The last map and its mean over all places: (B, P, H/32, W/32) and (B, P)."""

    features: Tensor
    pooled: Tensor


class ConvNet(nn.Module, ABC):
    """A convolutional backbone; images in are (B, 3, H, W) float32, ImageNet-normalised."""

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → the map that enters the first stage, (B, stem_channels, h, w)."""

    @abstractmethod
    def stage_modules(self) -> Sequence[nn.Sequential]:
        """Return the stages in order, each a sequence of blocks."""

    @abstractmethod
    def project(self, x: Tensor) -> Tensor:
        """Last stage's map → the map that is pooled, (B, pooled_width, h, w)."""

    @abstractmethod
    def last_modules(self) -> Sequence[nn.Module]:
        """Return the modules of ``project`` that have parameters."""

    def grid_for(self, height: int, width: int, stride: int = 32) -> tuple[int, int]:
        """Rows and columns of the tap at a stride, or ShapeError for an image under 32 pixels."""
        check_image_size((height, width))
        return -(-height // stride), -(-width // stride)

    def forward(self, images: Tensor) -> ConvNetOutput:
        """(B, 3, H, W) float32, normalised → the last map and its mean."""
        return self.forward_taps(images, ())[0]

    def forward_taps(
        self, images: Tensor, strides: Sequence[int] = TAP_STRIDES
    ) -> tuple[ConvNetOutput, list[Tensor]]:
        """One pass that gives the final output and the maps at some strides.

        Args:
            images: (B, 3, H, W) float32, ImageNet-normalised; sides of at least 32 pixels.
            strides: of 4, 8, 16, 32, in the order wanted.

        Returns:
            The final output, and one (B, C, ⌈H / stride⌉, ⌈W / stride⌉) tensor per stride, C as in
            ``config.tap_channels``.

        Raises:
            UsageError: another stride.
            ShapeError: a side under 32 pixels.
        """
        check_strides(strides)
        outputs = self._run(images, len(self.config.stages))
        features = self.project(outputs[-1])
        pooled = features.mean(dim=(2, 3))
        taps = [outputs[self.config.tap_stages[stride]] for stride in strides]
        return ConvNetOutput(features, pooled), taps

    def taps(self, images: Tensor, strides: Sequence[int] = TAP_STRIDES) -> list[Tensor]:
        """Maps at some strides; stages after the last one needed do not run.

        See ``forward_taps``.
        """
        check_strides(strides)
        needed = [self.config.tap_stages[stride] for stride in strides]
        outputs = self._run(images, max(needed, default=-1) + 1)
        return [outputs[index] for index in needed]

    def pooled(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float32, normalised → (B, pooled_width)."""
        return self(images).pooled

    def maps(self, images: Tensor, strides: Sequence[int], norm: TapNorm = "none") -> list[Tensor]:
        """As ``taps``; there is no final norm to apply, whatever ``norm`` says."""
        return self.taps(images, strides)

    def trace(self, images: Tensor, last: int | None) -> Iterator[tuple[str, Tensor]]:
        """Give the maps with names: after the stem, after each block, after the projection.

        Args:
            images: (B, 3, H, W) float32, normalised.
            last: stride of the deepest tap that is read; None reads the pooled output.

        What a deploy graph computes is compared with these, name by name.
        """
        x = self.embed(images)
        yield "stem", x
        for index, stage in enumerate(self.stage_modules()[: self.config.stage_count(last)]):
            for place, block in enumerate(stage):
                x = block(x)
                yield f"stages.{index}.{place}", x
        if last is None and self.last_modules():
            yield "projection", self.project(x)

    def trace_names(self, last: int | None) -> list[str]:
        """Names that ``trace`` gives, in order."""
        stages = self.stage_modules()[: self.config.stage_count(last)]
        blocks = [f"stages.{i}.{j}" for i, stage in enumerate(stages) for j in range(len(stage))]
        projected = last is None and self.last_modules()
        return ["stem", *blocks, *(["projection"] if projected else [])]

    def stage_end(self, stage: int) -> str:
        """Name that ``trace`` gives the output of a stage."""
        return f"stages.{stage}.{len(self.stage_modules()[stage]) - 1}"

    def first_convolution(self) -> nn.Conv2d:
        """Return the convolution that reads the image."""
        return next(module for module in self.modules() if isinstance(module, nn.Conv2d))

    def _run(self, images: Tensor, stages: int) -> list[Tensor]:
        check_image_size((images.shape[-2], images.shape[-1]))
        x = self.embed(images)
        outputs = []
        for stage in self.stage_modules()[:stages]:
            x = stage(x)
            outputs.append(x)
        return outputs

    def set_live_statistics_(self, live: bool) -> None:
        """Let BatchNorm use and follow the statistics of each batch in training; default: no."""
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.live = live

    def parameter_depths(self) -> dict[str, int]:
        """{parameter: depth}: 0 for the stem, 1 to n for the n blocks, n + 1 for the projection."""
        groups: list[Sequence[nn.Module]] = [
            [block] for stage in self.stage_modules() for block in stage
        ]
        groups.append(self.last_modules())
        depths = {
            id(parameter): depth
            for depth, modules in enumerate(groups, start=1)
            for module in modules
            for parameter in module.parameters()
        }
        return {name: depths.get(id(value), 0) for name, value in self.named_parameters()}


def check_strides(strides: Sequence[int]) -> None:
    """Refuse strides at which there is no tap."""
    bad = [stride for stride in strides if stride not in TAP_STRIDES]
    if bad:
        raise UsageError(
            f"no tap at stride {bad[0]}. Known: {', '.join(str(stride) for stride in TAP_STRIDES)}."
        )


def check_image_size(image_size: int | tuple[int, int] | None) -> None:
    """Refuse an image that is smaller than the largest stride.

    Args:
        image_size: pixels, one side of a square or (height, width); None is accepted.

    Raises:
        ShapeError: a side is under 32.
    """
    if image_size is None:
        return
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(sides) < MIN_SIZE:
        raise ShapeError(
            f"image size {min(sides)} is under {MIN_SIZE}, the stride of the last map. "
            f"Use {MIN_SIZE} or more."
        )


def init_weights_(model: ConvNet) -> ConvNet:
    """Initialise a backbone for training from scratch, in place (uses torch's global seed).

    Convolutions ~ N(0, 2 / fan-out), depthwise ones by their own channel's fan-out; biases 0. The
    statistics are those of noise: with 0 and 1 in their place, frozen, the maps would die out over
    EfficientNet's gates.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            area = module.kernel_size[0] * module.kernel_size[1]
            fan_out = area * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, BatchNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    device = next(model.parameters()).device
    return estimate_statistics_(model, torch.randn(8, 3, 64, 64, device=device))


@torch.no_grad()
def estimate_statistics_(model: ConvNet, images: Tensor) -> ConvNet:
    """Replace BatchNorm's stored statistics by those of one batch, in place.

    Args:
        model: its modes stay as they are.
        images: (B, 3, H, W) float32, normalised; at least two places per map (B·H·W / 32² ≥ 2).
    """
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    before = [(norm.training, norm.live, norm.momentum) for norm in norms]
    for norm in norms:
        norm.training, norm.live, norm.momentum = True, True, 1.0
    model(images)
    for norm, state in zip(norms, before, strict=True):
        norm.training, norm.live, norm.momentum = state
    return model
