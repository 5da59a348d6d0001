"""Random changes of a training picture and its mask, repeatable sample by sample.

Drawn from a stream of (seed, epoch, sample), so that a resumed run, another order or another number
of processes gives the same pictures. The operations are Kornia's (Apache-2.0, maintained, needs no
torchvision): Albumentations is no longer maintained and its successor is AGPL. Kornia's own random
classes draw from the global state per batch, and none of them drops several holes or draws a
blur's size: the drawing is ours, the pixels are Kornia's. Source: METHODS C, Augment.
"""

import hashlib
from typing import Any

import kornia
import msgspec
import numpy as np
import torch
from PIL import Image

from dinotrain.data.images import Pixels
from dinotrain.data.masks import IGNORE, Mask
from dinotrain.errors import ShapeError, UsageError

BICUBIC = Image.Resampling.BICUBIC
_GRID = (8, 8)


class AugmentConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Probability of each change, and how far it goes; the defaults are the source's list."""

    horizontal_flip: float = 0.5
    vertical_flip: float = 0.3
    rotate: float = 0.5
    max_angle_deg: float = 15.0
    elastic: float = 0.3
    elastic_shift: float = 0.01
    """Typical displacement (root mean square per axis), as a part of the shorter side."""
    elastic_smoothness: float = 0.04
    """Standard deviation of the smoothing of the displacement, as a part of the shorter side."""
    clahe: float = 0.3
    clahe_clip: float = 2.0
    brightness_contrast: float = 0.5
    max_change: float = 0.2
    """Largest change of brightness (of the full range) and of contrast (of the factor 1)."""
    blur: float = 0.3
    blur_kernels: tuple[int, ...] = (3, 5, 7)
    dropout: float = 0.3
    max_holes: int = 8
    hole_sides: tuple[float, float] = (0.02, 0.1)
    """Smallest and largest side of a hole, as a part of the picture's side."""

    def __post_init__(self) -> None:
        """Refuse probabilities outside 0..1, even blur kernels and empty ranges."""
        for name in CHANGES:
            chance = getattr(self, name)
            if not 0 <= chance <= 1:
                raise UsageError(f"augmentation '{name}' has probability {chance}; 0 to 1 is meant")
        if not self.blur_kernels or any(k < 3 or k % 2 == 0 for k in self.blur_kernels):
            raise UsageError(f"blur kernels are {self.blur_kernels}; odd sizes from 3 are accepted")
        low, high = self.hole_sides
        if not 0 < low <= high <= 1 or self.max_holes < 1:
            raise UsageError(
                f"{self.max_holes} holes with sides of {low} to {high}; at least one hole, and "
                "sides above 0 up to 1 are accepted"
            )


# Geometry first, then light, then blur: holes come last, so that nothing bends or smears them.
CHANGES = (
    "horizontal_flip",
    "vertical_flip",
    "rotate",
    "elastic",
    "clahe",
    "brightness_contrast",
    "blur",
    "dropout",
)
"""The changes in the order in which they are made."""


LIGHT = AugmentConfig(horizontal_flip=0, vertical_flip=0, rotate=0, elastic=0, clahe=0, dropout=0)
"""Brightness, contrast and blur: what leaves every distance in the picture as it is."""


def sample_stream(seed: int, epoch: int, name: str) -> np.random.Generator:
    """Return the random stream of one sample in one epoch.

    Args:
        seed: of the run.
        epoch: 0 or more.
        name: of the sample, unique in its data set.
    """
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, key])))


def augment(
    image: Pixels, mask: Mask | None, config: AugmentConfig, rng: np.random.Generator
) -> tuple[Pixels, Mask | None]:
    """Change a picture and its mask alike.

    What a rotation or a bend brings in from outside is the mirrored picture. Masks take the nearest
    pixel. Pixels under a hole lose their label: what is hidden cannot be known.

    Args:
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) uint8, class ids and 255; None where there is none.
        config: what to do.
        rng: see ``sample_stream``; every change has a child stream of its own, so that another
            probability of one leaves the others alone.

    Returns:
        The same shapes and types, in new memory.

    Raises:
        ShapeError: picture and mask differ in size.
    """
    if mask is not None and mask.shape != image.shape[:2]:
        raise ShapeError(
            f"the picture is {image.shape[:2]} and its mask {mask.shape}; both must have one size"
        )
    pair = _Pair(image, mask)
    streams = dict(zip(CHANGES, rng.spawn(len(CHANGES)), strict=True))
    for name in CHANGES:
        stream = streams[name]
        if stream.random() < getattr(config, name):
            with torch.inference_mode():
                _STEPS[name](pair, config, stream)
    return pair.image(), pair.mask()


def random_crop(
    image: Pixels,
    rng: np.random.Generator,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> Pixels:
    """Cut a random part out of a picture and enlarge it to the picture's size, bicubic.

    Args:
        image: (H, W, 3) uint8 RGB.
        rng: draws size, shape and place.
        area: smallest and largest part of the picture's area.
        aspect: smallest and largest width over height; drawn evenly on a logarithmic scale.

    Returns:
        (H, W, 3) uint8. After ten draws that do not fit, the whole picture.

    Source: METHODS D (RandomResizedCrop).
    """
    height, width = image.shape[:2]
    for _ in range(10):
        part = height * width * rng.uniform(*area)
        shape = float(np.exp(rng.uniform(*np.log(aspect))))
        across, down = (part * shape) ** 0.5, (part / shape) ** 0.5
        if across <= width and down <= height:
            left, top = rng.uniform(0, width - across), rng.uniform(0, height - down)
            box = (left, top, left + across, top + down)
            resized = Image.fromarray(image).resize((width, height), BICUBIC, box=box)
            return np.array(resized)
    return image


class _Pair:
    """A picture, (1, 3, H, W) float32 in 0..1, and its mask, (1, 1, H, W) float32 of ids."""

    def __init__(self, image: Pixels, mask: Mask | None) -> None:
        self.pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        self.ids = None if mask is None else torch.from_numpy(np.array(mask))[None, None].float()

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[-2], self.pixels.shape[-1]

    def move(self, operation: Any) -> None:
        """Apply ``operation(planes, mode)`` to both."""
        self.pixels = operation(self.pixels, "bilinear")
        if self.ids is not None:
            self.ids = operation(self.ids, "nearest")

    def image(self) -> Pixels:
        levels = (self.pixels[0].clamp(0, 1) * 255).round().to(torch.uint8)
        return np.ascontiguousarray(levels.permute(1, 2, 0).numpy())

    def mask(self) -> Mask | None:
        if self.ids is None:
            return None
        return np.ascontiguousarray(self.ids[0, 0].to(torch.uint8).numpy())


def _flip_horizontally(pair: _Pair, config: AugmentConfig, rng: np.random.Generator) -> None:
    pair.move(lambda planes, mode: planes.flip(-1))


def _flip_vertically(pair: _Pair, config: AugmentConfig, rng: np.random.Generator) -> None:
    pair.move(lambda planes, mode: planes.flip(-2))


def _rotate(pair: _Pair, config: AugmentConfig, rng: np.random.Generator) -> None:
    angle = torch.tensor([rng.uniform(-config.max_angle_deg, config.max_angle_deg)]).float()
    rotate = kornia.geometry.transform.rotate
    pair.move(lambda planes, mode: rotate(planes, angle, mode=mode, padding_mode="reflection"))


def _bend(pair: _Pair, config: AugmentConfig, rng: np.random.Generator) -> None:
    height, width = pair.size
    sigma = max(config.elastic_smoothness * min(height, width), 1.0)
    # Smoothing shrinks the noise to a spread that depends on sigma: what is asked for is the shift
    # that results, in the −1..1 of a side that Kornia counts in.
    noise = torch.from_numpy(rng.standard_normal((1, 2, height, width), dtype=np.float32))
    spread = 1 / (2 * np.pi**0.5 * sigma)
    shift = 2 * config.elastic_shift * min(height, width) / np.array([width, height])
    reach = min(int(np.ceil(3 * sigma)), min(height, width) - 1)
    bend = kornia.geometry.transform.elastic_transform2d
    pair.move(
        lambda planes, mode: bend(
            planes,
            noise,
            kernel_size=(2 * reach + 1, 2 * reach + 1),
            sigma=(sigma, sigma),
            alpha=(float(shift[0] / spread), float(shift[1] / spread)),
            mode=mode,
            padding_mode="reflection",
        )
    )


def _equalise(pair: _Pair, config: AugmentConfig, rng: np.random.Generator) -> None:
    # On lightness alone: colour channel by channel would shift the hues.
    lab = kornia.color.rgb_to_lab(pair.pixels)
    lightness = (lab[:, :1] / 100).clamp(0, 1)
    equal = kornia.enhance.equalize_clahe(lightness, config.clahe_clip, _GRID)
    pair.pixels = kornia.color.lab_to_rgb(torch.cat((equal * 100, lab[:, 1:]), dim=1))


def _relight(pair: _Pair, config: AugmentConfig, rng: np.random.Generator) -> None:
    contrast, brightness = rng.uniform(-config.max_change, config.max_change, 2).tolist()
    changed = kornia.enhance.adjust_contrast(pair.pixels, 1 + contrast, clip_output=False)
    pair.pixels = kornia.enhance.adjust_brightness(changed, brightness)


def _blur(pair: _Pair, config: AugmentConfig, rng: np.random.Generator) -> None:
    kernel = config.blur_kernels[int(rng.integers(len(config.blur_kernels)))]
    # OpenCV's rule from kernel to spread, which the source's library follows.
    sigma = 0.3 * ((kernel - 1) / 2 - 1) + 0.8
    pair.pixels = kornia.filters.gaussian_blur2d(pair.pixels, (kernel, kernel), (sigma, sigma))


def _drop(pair: _Pair, config: AugmentConfig, rng: np.random.Generator) -> None:
    height, width = pair.size
    # Kornia erases one rectangle per call and cannot leave the mask without labels there.
    for _ in range(int(rng.integers(1, config.max_holes + 1))):
        rows, cols = (_span(side, *config.hole_sides, rng=rng) for side in (height, width))
        pair.pixels[..., rows, cols] = 0
        if pair.ids is not None:
            pair.ids[..., rows, cols] = IGNORE


def _span(side: int, low: float, high: float, rng: np.random.Generator) -> slice:
    length = max(round(side * rng.uniform(low, high)), 1)
    start = int(rng.integers(0, side - length + 1))
    return slice(start, start + length)


_STEPS = {
    "horizontal_flip": _flip_horizontally,
    "vertical_flip": _flip_vertically,
    "rotate": _rotate,
    "elastic": _bend,
    "clahe": _equalise,
    "brightness_contrast": _relight,
    "blur": _blur,
    "dropout": _drop,
}
