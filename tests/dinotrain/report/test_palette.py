"""The palette, seen with each common colour vision."""

from itertools import combinations

import numpy as np
import pytest
from skimage.color import rgb2lab

from dinotrain.report.palette import IGNORED, SERIES, class_colours, rgb

# Machado, Oliveira & Fernandes 2009, full severity, on linear RGB.
VISIONS = {
    "normal": np.eye(3),
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
LEAST = 10.0
"""Of the Euclidean distance in CIELAB; 2.3 is just noticeable side by side, and these are seen
apart from each other. The nearest pair that people of normal vision tell apart well but others do
not scores 3."""


def nearest(colours, vision: str) -> float:
    srgb = np.array([rgb(colour) for colour in colours]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(VISIONS[vision]).T, 0, 1)
    back = np.where(seen <= 0.0031308, seen * 12.92, 1.055 * seen ** (1 / 2.4) - 0.055)
    lab = rgb2lab(back[None])[0]
    return min(float(np.linalg.norm(a - b)) for a, b in combinations(lab, 2))


@pytest.mark.parametrize("vision", VISIONS)
def test_series_and_classes_are_told_apart(vision):
    assert nearest(SERIES, vision) > LEAST
    assert nearest(class_colours(8)[1:], vision) > LEAST


def test_the_check_finds_a_pair_that_some_cannot_tell_apart():
    pair = ("#9c7a00", "#6f8a00")
    assert nearest(pair, "normal") > LEAST
    assert nearest(pair, "deutan") < LEAST


def test_many_classes_have_colours_of_their_own_and_the_background_is_grey():
    colours = class_colours(22)
    assert colours[0] == IGNORED
    assert len(set(colours)) == 22
    assert IGNORED not in class_colours(5, background=None)
    assert rgb("#0072b2") == (0, 114, 178)
