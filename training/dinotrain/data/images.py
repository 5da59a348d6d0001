"""From a picture file to pixels of the model's input size: checked, upright, cropped, resized.

Colour profiles are ignored: pixels are taken as sRGB, as a phone's camera preview gives them.
"""

import math
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from dinotrain.errors import DataError, ShapeError

Pixels = NDArray[np.uint8]
"""(height, width, 3), RGB."""

MAX_PIXELS = 50_000_000
MIN_SIDE_PX = 32
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
_ACCEPTED = "8-bit RGB and greyscale pictures are accepted (JPEG, PNG, WebP, TIFF, BMP)"
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1", b"avif")

_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, MemoryError)
"""What Pillow raises for files that are not whole."""

_REFUSED_MODES = {
    "1": "black and white",
    "I": "32-bit greyscale",
    "F": "floating-point greyscale",
    "CMYK": "CMYK, made for print",
    "LAB": "in the LAB colour space",
    "HSV": "in the HSV colour space",
}


def read_image(path: Path) -> Pixels:
    """Read a picture, upright by its EXIF orientation.

    Transparent pixels become black, as the border that ``crop_window`` adds. Greyscale is repeated
    in all three channels, as industrial line cameras are monochrome. Of an animation the first
    frame is read.

    Args:
        path: JPEG, PNG, WebP, TIFF, BMP or GIF, 8 bits per channel, in colour or greyscale.

    Returns:
        (height, width, 3) uint8, RGB.

    Raises:
        DataError: missing, unreadable, truncated, not a picture, 16-bit, CMYK, smaller than 32
            pixels or larger than 50 megapixels (known before anything is decoded).
    """
    with _open(path) as image:
        try:
            upright = ImageOps.exif_transpose(image)
            if upright.mode in ("P", "PA", "LA", "La") or "transparency" in upright.info:
                upright = upright.convert("RGBA")
            if upright.mode in ("RGBA", "RGBa"):
                upright = upright.convert("RGBA")
                black = Image.new("RGBA", upright.size, (0, 0, 0, 255))
                upright = Image.alpha_composite(black, upright)
            return np.array(upright.convert("RGB"), dtype=np.uint8)
        except _DAMAGE as error:
            raise _damaged(path, error) from error


def verify_image(path: Path) -> tuple[int, int]:
    """Decode a picture to see that ``read_image`` will read it; its pixels are not kept.

    Returns:
        (height, width) in pixels, upright.

    Raises:
        DataError: as ``read_image``.
    """
    with _open(path) as image:
        size = _upright_size(image)
        try:
            # A JPEG is unpacked to its last byte at an eighth of its size too, in less time.
            image.draft(image.mode, (max(size[1] // 8, 1), max(size[0] // 8, 1)))
            image.load()
        except _DAMAGE as error:
            raise _damaged(path, error) from error
        return size


def crop_window(
    image: Pixels, px_per_mm: float, window_mm: float, image_size: tuple[int, int]
) -> Pixels:
    """Cut a window of fixed width in millimetres around the centre, and resize it.

    So every picture has the same scale, and pixels carry millimetres. What the picture does not
    cover is black.

    Args:
        image: (H, W, 3) uint8.
        px_per_mm: scale of ``image``.
        window_mm: width of the window; its height follows from the aspect of ``image_size``.
        image_size: (height, width) of the result.

    Returns:
        (height, width, 3) uint8, bicubic with antialiasing.

    Source: METHODS B3.
    """
    _check(image)
    height, width = image.shape[:2]
    half_w = px_per_mm * window_mm / 2
    half_h = half_w * image_size[0] / image_size[1]
    box = (width / 2 - half_w, height / 2 - half_h, width / 2 + half_w, height / 2 + half_h)
    # Only the covered part is resized, so that a wrong scale cannot ask for a huge canvas; it is
    # cut at whole pixels of the result, so that its scale stays exact.
    per_x, per_y = 2 * half_w / image_size[1], 2 * half_h / image_size[0]
    left, right = _covered(-box[0] / per_x, (width - box[0]) / per_x, image_size[1])
    top, bottom = _covered(-box[1] / per_y, (height - box[1]) / per_y, image_size[0])
    inner = (
        max(box[0] + left * per_x, 0.0),
        max(box[1] + top * per_y, 0.0),
        min(box[0] + right * per_x, width),
        min(box[1] + bottom * per_y, height),
    )
    resized = Image.fromarray(image).resize(
        (right - left, bottom - top), Image.Resampling.BICUBIC, box=inner
    )
    result = np.zeros((*image_size, 3), dtype=np.uint8)
    result[top:bottom, left:right] = np.asarray(resized)
    return result


def fit_image(image: Pixels, image_size: tuple[int, int]) -> Pixels:
    """Cut the largest centred part of the wanted aspect, and resize it.

    Args:
        image: (H, W, 3) uint8.
        image_size: (height, width) of the result.

    Returns:
        (height, width, 3) uint8, bicubic with antialiasing; ``image`` itself if it has the size.
    """
    _check(image)
    height, width = image.shape[:2]
    if (height, width) == image_size:
        return image
    aspect = image_size[1] / image_size[0]
    part_w, part_h = min(width, height * aspect), min(height, width / aspect)
    box = (
        (width - part_w) / 2,
        (height - part_h) / 2,
        (width + part_w) / 2,
        (height + part_h) / 2,
    )
    resized = Image.fromarray(image).resize(
        (image_size[1], image_size[0]), Image.Resampling.BICUBIC, box=box
    )
    return np.array(resized, dtype=np.uint8)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except (OSError, SyntaxError, ValueError, EOFError):
        turned = False
    return (width, height) if turned else (height, width)


def _damaged(path: Path, error: BaseException) -> DataError:
    return DataError(
        f"{path}: the picture is truncated or damaged ({_one_line(error)}). Export it again."
    )


def _open(path: Path) -> Image.Image:
    """Open a picture and refuse it by its header; nothing is decoded yet."""
    if not path.is_file():
        what = "a folder, not a picture" if path.is_dir() else "no such picture"
        raise DataError(f"{path}: {what}. {_ACCEPTED}; check the path.")
    try:
        with warnings.catch_warnings():
            # Pillow warns from 89 megapixels on; our own limit below speaks instead.
            warnings.simplefilter("ignore")
            image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{path}: the picture has more than 50 megapixels. Shrink or crop it first."
        ) from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: {_unidentified(path)}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DataError(
            f"{path}: the picture cannot be read ({_one_line(error)}). {_ACCEPTED}; "
            "export it again."
        ) from error
    problem = _refusal(image)
    if problem:
        image.close()
        raise DataError(f"{path}: {problem}")
    return image


def _unidentified(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(12)
    if not start:
        return f"the file is empty. {_ACCEPTED}."
    if start[4:8] == b"ftyp" and start[8:12] in _HEIC_BRANDS:
        return f"the picture is HEIC or AVIF. {_ACCEPTED}; export it as JPEG."
    return f"not a picture, or a damaged one. {_ACCEPTED}."


def _refusal(image: Image.Image) -> str:
    """Return why a picture is refused, or nothing."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        return (
            f"the picture has {width * height / 1e6:.0f} megapixels ({width}×{height}), at most "
            f"{MAX_PIXELS // 1_000_000} are accepted. Shrink or crop it first."
        )
    if min(width, height) < MIN_SIDE_PX:
        return (
            f"the picture is {width}×{height} pixels, each side needs at least {MIN_SIDE_PX}. "
            "Give the full photograph."
        )
    # Pillow opens 16-bit RGB as 8-bit RGB and tells only in its decoder's arguments.
    if image.mode.startswith("I;16") or ";16" in str(
        [tile[3] for tile in getattr(image, "tile", [])]
    ):
        return f"the picture has 16 bits per channel. {_ACCEPTED}; convert it to 8 bits."
    if image.mode in _REFUSED_MODES:
        return f"the picture is {_REFUSED_MODES[image.mode]}. {_ACCEPTED}; convert it to 8-bit RGB."
    return ""


def _covered(start: float, end: float, size: int) -> tuple[int, int]:
    """Whole pixels of the result between two edges; the slack absorbs float rounding."""
    first, last = max(0, math.ceil(start - 1e-6)), min(size, math.floor(end + 1e-6))
    if last <= first:
        raise ShapeError(
            f"the picture covers less than one pixel of the window ({end - start:.2g}). "
            "Check px_per_mm."
        )
    return first, last


def _check(image: Pixels) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ShapeError(
            f"image is {image.dtype} of shape {image.shape}; (height, width, 3) uint8 is accepted"
        )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
