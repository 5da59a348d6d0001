"""Photographs in a report: masks laid over them, and galleries of cases."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinotrain.data.masks import IGNORE
from dinotrain.errors import ShapeError
from dinotrain.report.page import Gallery, Picture
from dinotrain.report.palette import IGNORED, class_colours, rgb

Pixels = NDArray[np.uint8]

PANEL_PX = 176
"""Height of a panel: three side by side fit twice across a page."""
MASK_PANEL_PX = 260
_GAP_PX = 3
_FILL, _HATCH_PX = 0.45, 4
_QUALITY = 88


def mask_overlay(
    pixels: Pixels,
    mask: NDArray[np.integer],
    classes: Sequence[str],
    ignore: int = IGNORE,
    background: int | None = 0,
) -> Pixels:
    """Lay a mask over a picture: each class tinted and outlined in its colour.

    The background is left as it is; pixels to ignore are hatched in grey.

    Args:
        pixels: (H, W, 3) uint8.
        mask: (H, W), class ids and ``ignore``; other values are drawn like ignored ones.
        classes: names, in the order of their ids.
        ignore: value without a label.
        background: the class that is left as it is, or None.

    Returns:
        (H, W, 3) uint8, a new array.

    Raises:
        ShapeError: picture and mask differ in size.
    """
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.shape[:2] != mask.shape:
        raise ShapeError(
            f"picture {pixels.shape} and mask {mask.shape} must be (H, W, 3) and (H, W)"
        )
    mask = mask.astype(np.int64)
    known = (mask >= 0) & (mask < len(classes)) & (mask != ignore)
    colours = np.array([rgb(c) for c in class_colours(len(classes), background)] + [rgb(IGNORED)])
    ink = colours[np.where(known, mask, len(classes))].astype(np.float64)
    rows, columns = np.indices(mask.shape)
    hatched = ~known & ((rows + columns) % (2 * _HATCH_PX) < _HATCH_PX)
    opacity = np.where(hatched, 0.8, _FILL * known)
    opacity[_outline(mask) & known] = 1.0
    if background is not None:
        opacity[mask == background] = 0.0
    mixed = pixels + opacity[..., None] * (ink - pixels)
    return mixed.round().astype(np.uint8)


def mask_legend(
    classes: Sequence[str], background: int | None = 0, ignored: bool = False
) -> list[tuple[str, str]]:
    """(name, colour) of what ``mask_overlay`` tints, for ``Gallery.legend``."""
    colours = class_colours(len(classes), background)
    legend = [
        (name, colour)
        for number, (name, colour) in enumerate(zip(classes, colours, strict=True))
        if number != background
    ]
    return [*legend, ("no label", IGNORED)] if ignored else legend


def picture_grid(
    items: Sequence[tuple[Image.Image | Pixels, str]],
    caption: str,
    legend: Sequence[tuple[str, str]] = (),
) -> Gallery:
    """Turn (picture, caption) into a gallery.

    The page lays it out, not one large PNG: so it flows on a phone, and captions are text in any
    script that can be found and copied.
    """
    pictures = []
    for picture, text in items:
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        data = io.BytesIO()
        # A fifth of a PNG's bytes; colours at full resolution, for the outlines of masks.
        image.convert("RGB").save(data, "JPEG", quality=_QUALITY, subsampling=0, optimize=True)
        pictures.append(Picture(data=data.getvalue(), caption=text, width_px=image.width))
    return Gallery(pictures=pictures, caption=caption, legend=legend)


def side_by_side(panels: Sequence[Pixels], height_px: int = PANEL_PX) -> Image.Image:
    """Put pictures of one sample beside each other, all ``height_px`` high.

    Args:
        panels: at least one (H, W, 3) uint8.
        height_px: small ones are enlarged pixel by pixel, as they are what a model saw.
    """
    scaled = [_scaled(panel, height_px) for panel in panels]
    width = sum(image.width for image in scaled) + _GAP_PX * (len(scaled) - 1)
    strip = Image.new("RGB", (width, height_px), IGNORED)
    left = 0
    for image in scaled:
        strip.paste(image, (left, 0))
        left += image.width + _GAP_PX
    return strip


def sample_strip(images: Mapping[str, Pixels]) -> Image.Image:
    """All pictures of one sample beside each other; a grey panel where there is none."""
    panels = [image for image in images.values() if image.size]
    return side_by_side(panels or [np.full((64, 64, 3), 128, np.uint8)])


def _scaled(panel: Pixels, height_px: int) -> Image.Image:
    high, wide = panel.shape[:2]
    size = (max(1, round(wide * height_px / high)), height_px)
    enlarged = high * 2 <= height_px
    method = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    return Image.fromarray(np.ascontiguousarray(panel)).resize(size, method)


def _outline(mask: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Pixels with another value right, left, above or below."""
    edge = np.zeros(mask.shape, np.bool_)
    across, down = mask[:, 1:] != mask[:, :-1], mask[1:] != mask[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    return edge
