"""Paper for a task's picture: text, lines, frames and photographs, smooth and in one style."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

OVERSAMPLE = 2
"""Drawn twice as large, then halved, for smooth lines."""

PAPER, INK, QUIET, RULE = (250, 250, 248), (28, 32, 38), (104, 111, 120), (214, 216, 219)
LINE_PX = 24
"""Height of a line of notes."""

_DASHES = dict.fromkeys(map(ord, "–—−‑"), "-")
"""The built-in font has no dash but the hyphen."""


class Sheet:
    """One drawing; all lengths are in final pixels, multiplied once on their way to Pillow.

    Args:
        width: of the drawing.
        height: of the drawing.
    """

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.canvas = Image.new("RGB", (width * OVERSAMPLE, height * OVERSAMPLE), PAPER)
        self.pen = ImageDraw.Draw(self.canvas, "RGBA")

    def finish(self) -> Image.Image:
        """Return the drawing at its final size."""
        return self.canvas.resize((self.width, self.height), Image.Resampling.LANCZOS)

    def picture(
        self, image: NDArray[np.uint8], place: tuple[float, float], size: tuple[int, int]
    ) -> None:
        """Paste a photograph with round corners, enlarged to ``size`` (width, height)."""
        wide, high = size[0] * OVERSAMPLE, size[1] * OVERSAMPLE
        enlarged = Image.fromarray(image).resize((wide, high), Image.Resampling.BICUBIC)
        mask = Image.new("L", (wide, high), 0)
        ImageDraw.Draw(mask).rounded_rectangle((0, 0, wide - 1, high - 1), 10 * OVERSAMPLE, 255)
        left, top = up(place)
        self.canvas.paste(enlarged, (round(left), round(top)), mask)

    def notes(self, lines: list[str], place: tuple[float, float]) -> None:
        """Write lines under each other, the first one in ink."""
        for index, line in enumerate(lines):
            ink = INK if index == 0 else QUIET
            self.text((place[0], place[1] + LINE_PX * index), line, 15, ink)

    def text(
        self, at: tuple[float, float], text: str, size: int, ink: tuple, anchor: str = "la"
    ) -> float:
        """Write text; returns its left edge."""
        self.pen.text(up(at), text, font=font(size), fill=ink, anchor=anchor)
        box = self.pen.textbbox(up(at), text, font=font(size), anchor=anchor)
        return box[0] / OVERSAMPLE

    def line(self, points: list[tuple[float, float]], ink: tuple, width: float) -> None:
        """Draw a line through points."""
        self.pen.line([up(point) for point in points], ink, max(1, round(width * OVERSAMPLE)))

    def box(self, box: tuple, fill: tuple, outline: tuple, radius: float = 10) -> None:
        """Draw a frame with round corners; ``box`` is (left, top, right, bottom)."""
        scaled = [value * OVERSAMPLE for value in box]
        self.pen.rounded_rectangle(scaled, radius * OVERSAMPLE, fill, outline, OVERSAMPLE)


def wrapped(text: str, width: float) -> list[str]:
    """Break text at spaces into lines at most ``width`` final pixels wide."""
    text = text.translate(_DASHES)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font(15).getlength(longer) > width * OVERSAMPLE:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def up(point: tuple[float, float]) -> tuple[float, float]:
    """Final pixels → pixels of the canvas."""
    return point[0] * OVERSAMPLE, point[1] * OVERSAMPLE


def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Return the built-in font at ``size`` final pixels."""
    return ImageFont.load_default(size * OVERSAMPLE)
