"""The eyelid task's picture for people: its three photographs with the measured distances to scale.

The model gives numbers, not places. So the corneal light reflex, which MRD1 and MRD2 start from, is
looked for in the picture by brightness, and the drawing says so.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from dinotrain.tasks.sheet import (
    INK,
    LINE_PX,
    OVERSAMPLE,
    QUIET,
    RULE,
    Sheet,
    font,
    up,
    wrapped,
)

PANEL_PX = 448
_COLOURS = {"mrd1": (255, 196, 61), "mrd2": (82, 205, 255), "lf": (214, 84, 120)}
"""Apart in hue and in lightness, so that they are told apart without colour vision."""
_CARD_COLOURS = {"mrd1": (173, 116, 0), "mrd2": (0, 112, 158), "lf": (176, 44, 84)}
_NAMES = {
    "mrd1": ("MRD1", "light reflex to upper lid"),
    "mrd2": ("MRD2", "light reflex to lower lid"),
    "lf": ("LF", "upper lid, down-gaze to up-gaze"),
}
_TITLES = {"primary": "primary gaze", "up": "up-gaze", "down": "down-gaze"}

_SEARCH_MM = 10.0
"""Half the side of the square around the centre in which the reflex is looked for."""
_SPOT_MM = 1.5
"""Bright things at least this wide are sclera or skin, not a reflex."""
_LEAST_CONTRAST = 80.0
"""Of 255. Over 120 rendered eyes a visible reflex scored 146 or more, lashes mostly below 70."""

_FOUND = "The light reflex (ring) was located by brightness in the picture."
_LOST = (
    "No light reflex stands out in the picture: MRD1 and MRD2 stand below the eye, as lengths only."
)
_LOST_BELOW_MM = 11.0
_SCALE = (
    "Lengths are the model's values drawn to scale, not marks found in the picture; "
    "the LF bar shows a length, not a place."
)


class Reflex(NamedTuple):
    """Where the brackets start, (x, y) in mm from the picture's centre; y downwards."""

    x_mm: float
    y_mm: float
    found: bool


def find_reflex(image: NDArray[np.uint8], window_mm: float) -> Reflex:
    """Look for the corneal light reflex: the brightest compact spot on dark ground near the centre.

    Args:
        image: (H, W, 3) uint8, primary gaze.
        window_mm: width that ``image`` shows.

    Returns:
        The spot, or the centre with ``found`` false where nothing stands out (as under a lid that
        covers the reflex).
    """
    px_per_mm = image.shape[1] / window_mm
    grey = ndimage.gaussian_filter(image.astype(np.float32).mean(axis=2), 0.08 * px_per_mm)
    reach = max(1, round(_SPOT_MM * px_per_mm / 2))
    rows, cols = np.ogrid[-reach : reach + 1, -reach : reach + 1]
    ground = ndimage.grey_opening(grey, footprint=rows**2 + cols**2 <= reach**2)
    # Iris and pupil are dark: a bright gap between lashes stands before bright sclera.
    score = (grey - ground) * (1 - ground / 255)
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width]
    x_mm, y_mm = (x + 0.5 - width / 2) / px_per_mm, (y + 0.5 - height / 2) / px_per_mm
    score[(np.abs(x_mm) > _SEARCH_MM) | (np.abs(y_mm) > _SEARCH_MM)] = 0
    peak = divmod(int(np.argmax(score)), width)
    if score[peak] < _LEAST_CONTRAST:
        return Reflex(0.0, 0.0, False)
    near = np.hypot(x_mm - x_mm[peak], y_mm - y_mm[peak]) < _SPOT_MM / 2
    weights = np.where(near, score, 0)
    total = weights.sum()
    return Reflex(
        float((weights * x_mm).sum() / total), float((weights * y_mm).sum() / total), True
    )


def draw_measurement(
    images: dict[str, NDArray[np.uint8]],
    outputs: dict[str, float],
    caption: str,
    window_mm: float = 40.0,
) -> Image.Image:
    """Draw MRD1 and MRD2 on the primary gaze, and LF between up- and down-gaze.

    Args:
        images: {"primary", "up", "down"}: (H, W, 3) uint8, each ``window_mm`` wide; a missing one
            is drawn as an empty frame.
        outputs: mrd1_mm, mrd2_mm, lf_mm, and their ``_std_mm`` where there are any; what is missing
            is left out.
        caption: notice under the pictures.
        window_mm: width of the pictures.

    Returns:
        An RGB picture.
    """
    sheet = _EyelidSheet(images, outputs, caption, window_mm)
    return sheet.draw()


class _EyelidSheet(Sheet):
    """One drawing of three gazes; all lengths are in final pixels."""

    margin, ruler, gap, lf_gap = 36, 46, 20, 132
    top, card = 36, 96

    def __init__(
        self,
        images: dict[str, NDArray[np.uint8]],
        outputs: dict[str, float],
        caption: str,
        window_mm: float,
    ) -> None:
        self.images, self.outputs, self.window_mm = images, outputs, window_mm
        primary = images.get("primary")
        self.reflex = None if primary is None else find_reflex(primary, window_mm)
        self.px_per_mm = PANEL_PX / window_mm
        self.height_px = max(
            (round(PANEL_PX * i.shape[0] / i.shape[1]) for i in images.values()), default=PANEL_PX
        )
        first = self.margin + self.ruler
        second = first + PANEL_PX + self.gap
        self.left = {
            "primary": first,
            "up": second,
            "down": second + PANEL_PX + self.lf_gap,
        }
        width = self.left["down"] + PANEL_PX + self.margin
        notes = [caption] if caption else []
        if self.reflex is not None:
            notes.append(f"{_FOUND if self.reflex.found else _LOST} {_SCALE}")
        self.lines = [line for note in notes for line in wrapped(note, width - 2 * self.margin)]
        self.bottom = self.top + self.height_px
        self.cards_top = self.bottom + 54
        self.notes_top = self.cards_top + self.card + 26
        super().__init__(width, self.notes_top + LINE_PX * len(self.lines) + self.margin - 8)

    def draw(self) -> Image.Image:
        for gaze, left in self.left.items():
            self._panel(gaze, left)
        self._ruler()
        if self.reflex is not None:
            self._brackets(self.reflex)
        self._excursion()
        self._cards()
        self.notes(self.lines, (self.margin, self.notes_top))
        return self.finish()

    def _panel(self, gaze: str, left: float) -> None:
        image = self.images.get(gaze)
        box = (left, self.top, left + PANEL_PX, self.bottom)
        if image is None:
            self.box(box, fill=(236, 237, 238), outline=RULE)
            centre = (left + PANEL_PX / 2, (self.top + self.bottom) / 2)
            self.text(centre, "no picture", 17, QUIET, anchor="mm")
        else:
            self.picture(image, (left, self.top), (PANEL_PX, self.height_px))
        centre = (left + PANEL_PX / 2, self.bottom + 14)
        self.text(centre, _TITLES[gaze], 16, QUIET, anchor="ma")

    def _ruler(self) -> None:
        """Millimetres down the left side, 0 at the top."""
        x = self.margin + self.ruler - 10
        height_mm = self.height_px / self.px_per_mm
        for mm in range(int(height_mm + 1e-6) + 1):
            y = self.top + mm * self.px_per_mm
            length = 12 if mm % 10 == 0 else 8 if mm % 5 == 0 else 4
            self.line([(x - length, y), (x, y)], INK if mm % 5 == 0 else QUIET, 1.2)
            if mm % 10 == 0:
                self.text((x - 16, y), str(mm), 13, INK, anchor="rm")
        self.line([(x, self.top), (x, self.top + height_mm * self.px_per_mm)], INK, 1.2)
        self.text((x, self.bottom + 16), "mm", 13, QUIET, anchor="ra")

    def _brackets(self, reflex: Reflex) -> None:
        # Without a place to start from, brackets on the eye would seem to mark its lids wrongly.
        below = 0.0 if reflex.found else _LOST_BELOW_MM
        x, y = self._place("primary", reflex.x_mm, reflex.y_mm + below)
        reach = 7.6 * self.px_per_mm if reflex.found else 12
        if reflex.found:
            self._dashed((x - reach, y), (x + reach, y))
        # MRD1 stands left and MRD2 right of the eye: they cannot collide, whatever their signs.
        if "mrd1_mm" in self.outputs:
            self._bracket("mrd1", x, y, -reach, -self.outputs["mrd1_mm"])
        if "mrd2_mm" in self.outputs:
            self._bracket("mrd2", x, y, reach, self.outputs["mrd2_mm"])
        if not reflex.found:
            return
        radius = 0.85 * self.px_per_mm
        for colour, width in (((0, 0, 0, 150), 4.0), ((255, 255, 255, 255), 1.8)):
            self._ring(x, y, radius, colour, width)

    def _bracket(self, target: str, x: float, y: float, offset: float, down_mm: float) -> None:
        """A bracket from the reflex's height, ``down_mm`` below it, and its value."""
        end = y + down_mm * self.px_per_mm
        bar = x + offset
        inner = x - offset * 0.15
        colour = _COLOURS[target]
        for ink, extra in (((0, 0, 0, 120), 2.4), (colour, 0.0)):
            self.line([(bar, y), (bar, end)], ink, 3.0 + extra)
            self.line([(bar, end), (inner, end)], ink, 1.8 + extra)
            for edge in (y, end):
                self.line([(bar - 6, edge), (bar + 6, edge)], ink, 3.0 + extra)
        side = 1 if offset > 0 else -1
        text = f"{_NAMES[target][0]} {_signed(self.outputs[target + '_mm'], 1)}"
        anchor = "lm" if side > 0 else "rm"
        self._tag((bar + 14 * side, (y + end) / 2), text, colour, anchor)

    def _excursion(self) -> None:
        """LF as a bar between up- and down-gaze, its millimetres marked."""
        value = self.outputs.get("lf_mm")
        if value is None:
            return
        x = self.left["up"] + PANEL_PX + self.lf_gap / 2
        middle = (self.top + self.bottom) / 2
        half = min(max(value, 0.0) * self.px_per_mm / 2, self.height_px / 2)
        low, high = middle + half, middle - half
        colour = _COLOURS["lf"]
        self.line([(x, high), (x, low)], colour, 3.5)
        for mm in range(1, int(max(value, 0.0)) + 1):
            y = low - mm * self.px_per_mm
            if y > high + 1:
                wide = 7 if mm % 5 == 0 else 4
                self.line([(x - wide, y), (x + wide, y)], colour, 1.4)
        for edge in (high, low):
            self.line([(x - 15, edge), (x + 15, edge)], colour, 3.5)
        self.text((x, high - 32), f"LF {_signed(value, 1)}", 18, _CARD_COLOURS["lf"], anchor="mm")
        self.text((x, high - 13), "up", 13, QUIET, anchor="mm")
        self.text((x, low + 14), "down", 13, QUIET, anchor="mm")

    def _cards(self) -> None:
        width = (self.width - 2 * self.margin - 2 * self.gap) / 3
        for index, (target, (name, meaning)) in enumerate(_NAMES.items()):
            left = self.margin + index * (width + self.gap)
            top = self.cards_top
            self.box((left, top, left + width, top + self.card), (255, 255, 255), RULE)
            ink = _CARD_COLOURS[target]
            self.box((left, top + 14, left + 5, top + self.card - 14), ink, ink, radius=2)
            self.text((left + 24, top + 22), name, 22, ink)
            self.text((left + 24, top + 56), meaning, 15, QUIET)
            value = self.outputs.get(f"{target}_mm")
            std = self.outputs.get(f"{target}_std_mm")
            right = left + width - 22
            spread = "" if std is None else f" ± {std:.2f}"
            number = "-" if value is None else _signed(value, 2)
            end = self.text((right, top + self.card / 2), " mm", 17, QUIET, anchor="rm")
            if value is not None and spread:
                end = self.text((end, top + self.card / 2), spread, 19, QUIET, anchor="rm")
            self.text((end - 2, top + self.card / 2), number, 40, INK, anchor="rm")

    def _place(self, gaze: str, x_mm: float, y_mm: float) -> tuple[float, float]:
        x = self.left[gaze] + PANEL_PX / 2 + x_mm * self.px_per_mm
        return x, (self.top + self.bottom) / 2 + y_mm * self.px_per_mm

    def _tag(self, at: tuple[float, float], text: str, colour: tuple, anchor: str) -> None:
        """Text on a dark label, readable on any skin."""
        box = self.pen.textbbox(up(at), text, font=font(16), anchor=anchor)
        pad_x, pad_y = 7 * OVERSAMPLE, 5 * OVERSAMPLE
        around = (box[0] - pad_x, box[1] - pad_y, box[2] + pad_x, box[3] + pad_y)
        self.pen.rounded_rectangle(around, 6 * OVERSAMPLE, (16, 20, 26, 205))
        self.pen.text(up(at), text, font=font(16), fill=colour, anchor=anchor)

    def _dashed(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        x, y = start
        while x < end[0]:
            self.line([(x, y), (min(x + 5, end[0]), y)], (255, 255, 255, 190), 1.4)
            x += 10

    def _ring(self, x: float, y: float, radius: float, ink: tuple, width: float) -> None:
        box = [*up((x - radius, y - radius)), *up((x + radius, y + radius))]
        self.pen.ellipse(box, outline=ink, width=round(width * OVERSAMPLE))


def _signed(value: float, digits: int) -> str:
    # Not "-0.0".
    return f"{value:.{digits}f}" if round(value, digits) else f"{0:.{digits}f}"
