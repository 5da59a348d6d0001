"""The drawing: the reflex is found where it is, and lengths are to scale."""

import numpy as np
import pytest

from dinotrain.data.synthetic.eyes import render_eye
from dinotrain.tasks import get_task
from dinotrain.tasks.eyelid_drawing import (
    _COLOURS,
    PANEL_PX,
    draw_measurement,
    find_reflex,
)

OUTPUTS = {"mrd1_mm": 4.0, "mrd2_mm": 5.5, "lf_mm": 12.0}
WINDOW_MM = 40.0


def spotted(x_mm: float, y_mm: float, spot: int = 255) -> np.ndarray:
    """Return a dark iris on bright sclera, 10 px per mm, with a spot of 0.5 mm."""
    y, x = (np.mgrid[:400, :400] + 0.5 - 200) / 10
    image = np.full((400, 400, 3), 120, np.uint8)
    image[np.hypot(x, y / 0.6) < 12] = 225
    image[np.hypot(x, y) < 6] = 60
    image[np.hypot(x - x_mm, y - y_mm) < 0.25] = spot
    return image


@pytest.mark.parametrize("place", [(0.0, 0.0), (1.3, -0.7), (-2.0, 1.5)])
def test_the_reflex_is_found(place):
    found = find_reflex(spotted(*place), WINDOW_MM)
    assert found.found
    # A pixel is 0.1 mm.
    assert (found.x_mm, found.y_mm) == pytest.approx(place, abs=0.1)


def test_an_eye_without_reflex_is_told():
    assert not find_reflex(spotted(0, 0, spot=60), WINDOW_MM).found
    assert not find_reflex(np.full((28, 28, 3), 255, np.uint8), WINDOW_MM).found


def test_rendered_reflexes_are_found():
    errors = []
    for index in range(12):
        eye = render_eye(5, index, 112, WINDOW_MM)
        if eye.mrd1_mm < 0.5:
            continue
        found = find_reflex(eye.images["primary"], WINDOW_MM)
        x, y = eye.marks_mm["primary"]["reflex"]
        errors.append(np.hypot(found.x_mm - x, found.y_mm - y) if found.found else np.inf)
    assert len(errors) >= 6
    # A pixel is 0.36 mm.
    assert max(errors) < 0.36


def rows_of(image: np.ndarray, colour, columns: slice) -> np.ndarray:
    close = np.abs(image[:, columns].astype(int) - colour).sum(axis=2) < 60
    return np.nonzero(close.any(axis=1))[0]


@pytest.mark.parametrize("mrd1", [4.0, 1.0, -1.5])
def test_brackets_are_to_scale_and_start_at_the_reflex(mrd1):
    images = dict.fromkeys(("primary", "up", "down"), spotted(0, 0))
    outputs = OUTPUTS | {"mrd1_mm": mrd1}
    drawn = np.array(draw_measurement(images, outputs, "", WINDOW_MM))
    per_mm = PANEL_PX / WINDOW_MM
    left, top = 82, 36
    centre = left + PANEL_PX / 2
    # Where the bars themselves stand, without their labels.
    bars = {"mrd1": (-7.6, -mrd1), "mrd2": (7.6, 5.5)}
    for target, (offset, down) in bars.items():
        at = round(centre + offset * per_mm)
        rows = rows_of(drawn, _COLOURS[target], slice(at - 6, at + 6)) - top - PANEL_PX / 2
        # Lines are 3 px wide, and their edges are smoothed.
        assert rows.min() == pytest.approx(min(0, down * per_mm), abs=3)
        assert rows.max() == pytest.approx(max(0, down * per_mm), abs=3)


def test_the_lf_bar_is_to_scale():
    images = dict.fromkeys(("primary", "up", "down"), spotted(0, 0))
    drawn = np.array(draw_measurement(images, OUTPUTS, "", WINDOW_MM))
    bar = 82 + 2 * PANEL_PX + 20 + 66
    # Below the label, which is darker and stands on the same axis.
    rows = rows_of(drawn[: 36 + PANEL_PX], _COLOURS["lf"], slice(bar - 1, bar + 2))
    assert np.ptp(rows) == pytest.approx(12.0 * PANEL_PX / WINDOW_MM, abs=6)


def test_a_longer_value_makes_another_picture():
    images = {"primary": spotted(0, 0)}
    first, second, third = (
        np.array(draw_measurement(images, outputs, caption, WINDOW_MM))
        for outputs, caption in (
            (OUTPUTS, "notice"),
            (OUTPUTS | {"mrd1_std_mm": 0.2}, "notice"),
            (OUTPUTS, "another – notice"),
        )
    )
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, third)


@pytest.mark.parametrize("shape", [(224, 224), (112, 224), (518, 518)], ids=str)
def test_pictures_may_be_missing_odd_or_blank(shape):
    blank = np.zeros((*shape, 3), np.uint8)
    for images in ({"primary": blank}, {}, dict.fromkeys(("primary", "up", "down"), blank)):
        for outputs in ({}, {"lf_mm": 0.0, "mrd1_mm": -6.0}, {"lf_mm": 31.9, "mrd2_mm": 15.9}):
            drawn = draw_measurement(images, outputs, "a long notice " * 40, WINDOW_MM)
            assert drawn.mode == "RGB"
            assert drawn.width > 3 * 336


def test_the_task_draws():
    task = get_task("eyelid")
    sample = task.render_samples(1, (112, 112))[0]
    assert task.draw(sample, OUTPUTS, "notice").width > 3 * 336
