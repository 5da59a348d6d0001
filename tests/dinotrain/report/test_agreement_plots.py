"""Parity, Bland–Altman, coverage and interval plots, read back from their SVG."""

import re
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest

from dinotrain.report.agreement_plots import (
    MOST_INTERVALS,
    bland_altman,
    coverage_plot,
    interval_plot,
    parity_plot,
)

RNG = np.random.default_rng(1)
TRUE = RNG.normal(3, 1, 40)
GUESS = TRUE + RNG.normal(0.2, 0.4, 40)


def points(svg: bytes) -> np.ndarray:
    """Places of scattered points, (n, 2); y upwards."""
    root = ElementTree.fromstring(svg)
    group = next(e for e in root.iter() if e.get("id") == "PathCollection_1")
    uses = [e for e in group.iter() if e.tag.endswith("use")]
    return np.array([(float(e.get("x")), -float(e.get("y"))) for e in uses])


def texts(svg: bytes) -> str:
    return " ".join(e.text or "" for e in ElementTree.fromstring(svg).iter() if "text" in e.tag)


def straight(drawn: np.ndarray, value: np.ndarray) -> bool:
    """Whether places are values on a linear axis; SVG has six decimals."""
    slope, offset = np.polyfit(value, drawn, 1)
    return slope > 0 and np.abs(slope * value + offset - drawn).max() < 1e-4


def test_parity_has_truth_across_and_predictions_up():
    drawn = points(parity_plot(GUESS, TRUE, "mrd1_mm", "mm").data)
    assert straight(drawn[:, 0], TRUE) and straight(drawn[:, 1], GUESS)
    # A planted fault: axes exchanged are seen.
    swapped = points(parity_plot(TRUE, GUESS, "mrd1_mm", "mm").data)
    assert not straight(swapped[:, 0], TRUE)


def test_parity_has_one_scale_on_both_axes():
    drawn = points(parity_plot(GUESS, TRUE, "x", "mm").data)
    across, up = np.polyfit(TRUE, drawn[:, 0], 1)[0], np.polyfit(GUESS, drawn[:, 1], 1)[0]
    assert across == pytest.approx(up, rel=1e-5)


def test_parity_states_error_and_agreement():
    figure = parity_plot(GUESS, TRUE, "mrd1_mm", "mm")
    mae = np.mean(np.abs(GUESS - TRUE))
    # ICC(2,1) from an analysis of variance, written out.
    table = np.stack([GUESS, TRUE], axis=1)
    n, k, grand = len(table), 2, table.mean()
    rows = k * np.sum((table.mean(1) - grand) ** 2) / (n - 1)
    columns = n * np.sum((table.mean(0) - grand) ** 2) / (k - 1)
    rest = np.sum((table - grand) ** 2) - (n - 1) * rows - (k - 1) * columns
    rest /= (n - 1) * (k - 1)
    icc = (rows - rest) / (rows + (k - 1) * rest + k * (columns - rest) / n)
    for text in (figure.alt, texts(figure.data)):
        assert f"MAE {mae:.3f} mm" in text and f"ICC {icc:.3f}" in text and "n = 40" in text


def test_missing_values_are_left_out():
    guess, true = GUESS.copy(), TRUE.copy()
    guess[0], true[1], guess[2] = np.nan, np.nan, np.inf
    for draw in (parity_plot, bland_altman):
        assert len(points(draw(guess, true, "x", "mm").data)) == 37


def test_bland_altman_draws_differences_over_means_with_their_limits():
    figure = bland_altman(GUESS, TRUE, "mrd1_mm", "mm")
    drawn, error = points(figure.data), GUESS - TRUE
    assert straight(drawn[:, 0], (GUESS + TRUE) / 2) and straight(drawn[:, 1], error)
    bias, half = error.mean(), 1.96 * error.std(ddof=1)
    for label, value in (
        ("bias", bias),
        ("upper limit", bias + half),
        ("lower limit", bias - half),
    ):
        assert f"{label} {value:+.2f} mm".replace("-", "−") in figure.caption


@pytest.mark.parametrize("draw", [parity_plot, bland_altman])
@pytest.mark.parametrize(
    "values",
    [[], [np.nan], [2.0], [2.0, 2.0], [0.0, 0.0], [1e9, -1e9], [1e-9, 2e-9]],
    ids=["none", "unlabelled", "one", "equal", "zero", "huge", "tiny"],
)
def test_odd_data_are_drawn(draw, values):
    figure = draw(values, values, "x", "mm")
    ElementTree.fromstring(figure.data)
    assert ("no labelled samples" in texts(figure.data)) == (not np.isfinite(values).any())


def test_labels_of_close_limits_do_not_touch():
    guess = TRUE + RNG.normal(0, 0.001, 40)
    guess[0] += 50
    root = ElementTree.fromstring(bland_altman(guess, TRUE, "x", "mm").data)
    # The title may stand anywhere; the three labels are the ones beside the axes.
    places = {}
    for element in root.iter():
        if element.tag.endswith("text") and element.text in ("bias", "upper limit", "lower limit"):
            found = re.search(r"translate\(([\d.]+) ([\d.]+)\)", element.get("transform", ""))
            places[element.text] = float(found[2] if found else element.get("y"))
    heights = sorted(places.values())
    assert len(heights) == 3
    # Two lines of 8 pt.
    assert min(b - a for a, b in pairwise(heights)) > 16


def test_coverage_is_drawn_where_it_is():
    curve = {"0.1": 0.05, "0.5": 0.4, "0.9": None}
    figure = coverage_plot({"a_mm": curve, "b_mm": {0.5: 0.5}})
    assert "a_mm" in texts(figure.data) and "b_mm" in figure.alt
    root = ElementTree.fromstring(figure.data)
    markers = [
        [(float(u.get("x")), -float(u.get("y"))) for u in g.iter() if u.tag.endswith("use")]
        for g in root.iter()
        if (g.get("id") or "").startswith("line2d")
    ]
    drawn = [m for m in markers if len(m) == 2]
    assert len(drawn) == 1
    (x0, y0), (x1, y1) = drawn[0]
    assert (y1 - y0) / (x1 - x0) == pytest.approx((0.4 - 0.05) / (0.5 - 0.1), rel=1e-4)
    assert coverage_plot({}).data


def test_intervals_say_how_many_hold():
    low, high = TRUE - 0.3, TRUE + 0.3
    low[:10], high[:10] = TRUE[:10] + 0.1, TRUE[:10] + 0.2
    high[39] = np.nan
    figure = interval_plot(low, high, TRUE, "lf_mm", "mm", 0.9)
    assert "74.4 % of 39 hold, stated 90 %" in figure.caption
    many = np.linspace(0, 1, 5000)
    svg = interval_plot(many - 1, many + 1, many, "x", "mm", None).data
    group = next(e for e in ElementTree.fromstring(svg).iter() if e.get("id") == "LineCollection_1")
    assert len([e for e in group.iter() if e.tag.endswith("path")]) <= MOST_INTERVALS
    assert "no labelled samples" in texts(interval_plot([], [], [], "x", "mm", 0.9).data)
