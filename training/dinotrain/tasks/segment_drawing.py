"""The segmentation task's picture for people: the photograph, and the classes laid over it."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from dinotrain.report.palette import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, YELLOW, rgb
from dinotrain.tasks.sheet import INK, LINE_PX, QUIET, Sheet, wrapped

PANEL_PX = 448
COVER = 0.45
"""How much of a class's colour lies over the photograph; its outline is the colour itself."""

_MARGIN, _GAP, _ROW = 36, 24, 30
_COLOURS = tuple(rgb(colour) for colour in (ORANGE, BLUE, VERMILION, GREEN, PURPLE, SKY, YELLOW))


def class_colour(number: int) -> tuple[int, int, int]:
    """Return the colour of a class above the background; from the eighth on they repeat."""
    return _COLOURS[(number - 1) % len(_COLOURS)]


def draw_class_map(
    image: NDArray[np.uint8],
    class_map: NDArray[np.integer],
    caption: str,
    classes: tuple[str, ...],
) -> Image.Image:
    """Draw the photograph, the same with its classes in colours, and what part each covers.

    Args:
        image: (H, W, 3) uint8, as the model saw it.
        class_map: (1, H, W) or (H, W), class ids; 0 is the background and has no colour.
        caption: notice under the pictures.
        classes: names.

    Returns:
        An RGB picture.
    """
    ids = np.asarray(class_map).reshape(image.shape[:2]).astype(np.int64)
    shares = np.bincount(ids.ravel(), minlength=len(classes)) / ids.size
    width = 2 * _MARGIN + 2 * PANEL_PX + _GAP
    high = round(PANEL_PX * image.shape[0] / image.shape[1])
    shown = [n for n in range(1, len(classes)) if shares[n]]
    lines = wrapped(caption, width - 2 * _MARGIN) if caption else []
    top = _MARGIN + high + 22
    foot = top + _ROW * (len(shown) + 1) + 10
    sheet = Sheet(width, foot + LINE_PX * len(lines) + _MARGIN - 8)
    sheet.picture(image, (_MARGIN, _MARGIN), (PANEL_PX, high))
    second = _MARGIN + PANEL_PX + _GAP
    sheet.picture(overlay(image, ids), (second, _MARGIN), (PANEL_PX, high))
    for place, number in enumerate(sorted(shown, key=lambda n: -shares[n])):
        y = top + _ROW * place
        colour = class_colour(number)
        sheet.box((second, y, second + 18, y + 18), colour, colour, radius=3)
        sheet.text((second + 28, y), classes[number], 17, INK)
        sheet.text((second + PANEL_PX, y), f"{100 * shares[number]:.2f} %", 17, INK, anchor="ra")
    y = top + _ROW * len(shown)
    sheet.text((second + 28, y), classes[0], 17, QUIET)
    sheet.text((second + PANEL_PX, y), f"{100 * shares[0]:.2f} %", 17, QUIET, anchor="ra")
    sheet.notes(lines, (_MARGIN, foot))
    return sheet.finish()


def overlay(image: NDArray[np.uint8], ids: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Lay the classes' colours over a photograph, their outlines opaque.

    Args:
        image: (H, W, 3) uint8.
        ids: (H, W), class ids; 0 and what is no class (255) stay bare.

    Returns:
        (H, W, 3) uint8.
    """
    result = image.astype(np.float32)
    for number in np.unique(ids).tolist():
        if number in (0, 255):
            continue
        inside = ids == number
        rim = inside & np.logical_not(ndimage.binary_erosion(inside, border_value=1))
        colour = np.array(class_colour(number), np.float32)
        result[inside] += COVER * (colour - result[inside])
        result[rim] = colour
    return np.rint(result).astype(np.uint8)
