"""Masks: from a file to class ids at the model's size, without a value that nobody wrote."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from dinotrain.data.images import MAX_PIXELS
from dinotrain.errors import DataError

Mask = NDArray[np.uint8]
"""(height, width), class ids and ``IGNORE``."""

IGNORE = 255
"""Value of pixels without a label: they count neither in a loss nor in a metric."""

_MODES = {
    "LA": "greyscale with transparency",
    "I": "16-bit greyscale",
    "I;16": "16-bit greyscale",
    "I;16B": "16-bit greyscale",
}


def read_mask(path: Path) -> Mask:
    """Read a mask: the stored ids, never the palette's colours; upright by its EXIF orientation.

    Args:
        path: PNG, 8 bits per pixel greyscale, or indexed.

    Returns:
        (height, width) uint8.

    Raises:
        DataError: missing, unreadable, truncated, no PNG, or neither indexed nor 8-bit greyscale.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such mask. Check the path.")
    try:
        with Image.open(path, formats=("PNG",)) as image:
            problem = _mask_refusal(image)
            if problem:
                raise DataError(f"{path}: {problem}")
            return np.array(ImageOps.exif_transpose(image), dtype=np.uint8)
    except UnidentifiedImageError as error:
        raise DataError(
            f"{path}: not a PNG, or a damaged one. Masks are PNG, for other formats change values."
        ) from error
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{path}: the mask has more than 50 megapixels. Shrink it first."
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise DataError(
            f"{path}: the mask is truncated or damaged ({reason}). Export it again."
        ) from error


def fit_mask(mask: Mask, image_size: tuple[int, int]) -> Mask:
    """Cut and resize a mask as ``images.fit_image`` does its picture, taking the nearest pixel.

    Args:
        mask: (H, W) uint8.
        image_size: (height, width) of the result.

    Returns:
        (height, width) uint8, of the values in ``mask`` only.
    """
    height, width = mask.shape
    if (height, width) == image_size:
        return mask
    aspect = image_size[1] / image_size[0]
    part_w, part_h = min(width, height * aspect), min(height, width / aspect)
    left, top = (width - part_w) / 2, (height - part_h) / 2
    box = (left, top, left + part_w, top + part_h)
    resized = Image.fromarray(mask).resize(
        (image_size[1], image_size[0]), Image.Resampling.NEAREST, box=box
    )
    return np.array(resized, dtype=np.uint8)


def _mask_refusal(image: Image.Image) -> str:
    """Return why a mask is refused by its header, or nothing."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        return f"the mask has {width}×{height} pixels, more than 50 megapixels. Shrink it first."
    accepted = "8-bit indexed or greyscale PNG of class ids is accepted; convert it."
    # Pillow spreads 1, 2 and 4-bit grey over 0..255, which destroys ids; indexed files keep them.
    depths = [str(tile[3]) for tile in getattr(image, "tile", [])]
    if image.mode == "1" or any(depth in ("L;2", "L;4") for depth in depths):
        return f"greyscale of fewer than 8 bits. {accepted}"
    if image.mode not in ("P", "L"):
        return f"the mask is {_MODES.get(image.mode, 'in colour')}. {accepted}"
    return ""
