"""The classification task's picture for people: the photograph beside its most probable classes."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinotrain.tasks.sheet import INK, LINE_PX, OVERSAMPLE, QUIET, RULE, Sheet, font, wrapped

PANEL_PX = 448
SHOWN = 8
"""Classes with a bar; the others share a line."""

_MARGIN, _GAP, _BARS_PX = 36, 36, 460
_BAR, _REST = (0, 112, 158), (168, 190, 204)


def draw_classes(
    image: NDArray[np.uint8], outputs: dict[str, Any], caption: str, classes: tuple[str, ...]
) -> Image.Image:
    """Draw a bar per class, the most probable first.

    Args:
        image: (H, W, 3) uint8, as the model saw it.
        outputs: probabilities, (1, classes) or (classes,); their ``_std`` where there is one.
        caption: notice under the picture.
        classes: names.

    Returns:
        An RGB picture.
    """
    probabilities = np.ravel(outputs["probabilities"])
    spread = outputs.get("probabilities_std")
    width = 2 * _MARGIN + PANEL_PX + _GAP + _BARS_PX
    lines = wrapped(caption, width - 2 * _MARGIN) if caption else []
    high = round(PANEL_PX * image.shape[0] / image.shape[1])
    ranked = np.argsort(-probabilities, kind="stable")
    bars = max(high, 54 * min(len(ranked), SHOWN) + 30)
    sheet = Sheet(width, _MARGIN + bars + 30 + LINE_PX * len(lines) + _MARGIN - 8)
    sheet.picture(image, (_MARGIN, _MARGIN), (PANEL_PX, high))
    left, top = _MARGIN + PANEL_PX + _GAP, float(_MARGIN)
    for place, index in enumerate(ranked[:SHOWN].tolist()):
        value = float(probabilities[index])
        plus = "" if spread is None else f" ± {float(np.ravel(spread)[index]):.3f}"
        ink = INK if place == 0 else QUIET
        sheet.text((left, top + 4), _shortened(classes[index], _BARS_PX - 150), 17, ink)
        sheet.text((left + _BARS_PX, top + 4), f"{value:.3f}{plus}", 17, ink, anchor="ra")
        sheet.box((left, top + 32, left + _BARS_PX, top + 42), RULE, RULE, radius=3)
        if value * _BARS_PX >= 1:
            colour = _BAR if place == 0 else _REST
            end = left + max(value * _BARS_PX, 6)
            sheet.box((left, top + 32, end, top + 42), colour, colour, radius=3)
        top += 54
    if len(ranked) > SHOWN:
        rest = float(probabilities[ranked[SHOWN:]].sum())
        text = f"{len(ranked) - SHOWN} other classes: {rest:.3f}"
        sheet.text((left, top + 4), text, 15, QUIET)
    sheet.notes(lines, (_MARGIN, _MARGIN + bars + 30))
    return sheet.finish()


def _shortened(text: str, width: float) -> str:
    """Cut a long name so that it stays beside its number."""
    if font(17).getlength(text) <= width * OVERSAMPLE:
        return text
    while text and font(17).getlength(text + "...") > width * OVERSAMPLE:
        text = text[:-1]
    return text + "..."
