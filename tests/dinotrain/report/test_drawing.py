"""Drawing: reproducible, without matplotlib's global state, and without loading it too early."""

import subprocess
import sys
from itertools import pairwise
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from dinotrain.errors import ShapeError
from dinotrain.report.agreement_plots import parity_plot
from dinotrain.report.drawing import MANY_POINTS, paired, span, spread

MODULES = ("page", "class_section", "measure_section", "mask_section", "run_plots", "event_log")


def draw(name="x", count=20) -> bytes:
    rng = np.random.default_rng(0)
    y = rng.normal(size=count)
    return parity_plot(y, y + rng.normal(size=count), name, "mm").data


def test_the_same_plot_has_the_same_bytes_and_no_date():
    assert draw() == draw()
    assert b"<dc:date>" not in draw() and b"Matplotlib v" not in draw()


def test_the_style_of_a_user_changes_nothing_and_is_kept():
    before = draw()
    with matplotlib.rc_context({"font.size": 31.0, "axes.facecolor": "red", "svg.hashsalt": "y"}):
        assert draw() == before
        assert matplotlib.rcParams["font.size"] == 31.0
        assert matplotlib.rcParams["svg.hashsalt"] == "y"
    assert "matplotlib.pyplot" not in sys.modules


def test_colours_follow_the_page():
    data = draw()
    assert b"var(--ink, #1c2026)" in data and b"var(--rule, #d6d8db)" in data
    ElementTree.fromstring(data)


@pytest.mark.parametrize(
    "name", ["$x^{2$", "a\x00b", "<&>", "عيون", "目" * 30, "\\frac{", "%s {} _"]
)
def test_names_are_drawn_as_they_are(name):
    texts = [e.text for e in ElementTree.fromstring(draw(name)).iter() if e.tag.endswith("text")]
    title = name.replace("\x00", "�")
    assert any(text == title or (text or "").startswith(title[:8]) for text in texts)


def test_many_points_become_pixels():
    few, many = draw(count=MANY_POINTS - 1), draw(count=20 * MANY_POINTS)
    assert b"<image" in many and b"<image" not in few
    assert len(many) < len(few)


def test_nothing_of_it_is_loaded_before_the_first_plot():
    code = (
        f"import sys; from dinotrain.report import {', '.join(MODULES)}; "
        "loaded = [m for m in ('matplotlib', 'tensorboardX') if m in sys.modules]; "
        "sys.exit(str(loaded) if loaded else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_labels_are_moved_apart_and_no_further():
    assert spread([0.0, 1.0, 2.0], 0.5) == [0.0, 1.0, 2.0]
    moved = spread([0.1, 0.0, 0.0, 5.0], 1.0)
    assert moved[3] == 5.0
    assert sorted(moved[:3])[1] == pytest.approx(sum([0.1, 0.0, 0.0]) / 3)
    order = sorted(moved)
    # Rounding of one subtraction.
    assert min(b - a for a, b in pairwise(order)) >= 1.0 - 1e-12
    assert moved[0] > moved[1]


def test_axes_show_everything_and_are_never_empty():
    low, high = span(np.array([1.0, 3.0]), np.array([2.0]))
    assert low < 1 and high > 3
    assert span(np.zeros(2)) == (-0.5, 0.5)


def test_pairs_are_of_one_length_and_finite():
    guess, y = paired([1, np.nan, 3, np.inf], [1, 2, np.nan, 4])
    assert guess.tolist() == y.tolist() == [1.0]
    with pytest.raises(ShapeError, match="of one length"):
        paired([1, 2], [1])
    with pytest.raises(ShapeError):
        paired([[1.0]], [[1.0]])
