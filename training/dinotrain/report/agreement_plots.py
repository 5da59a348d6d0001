"""Plots of measured against true values: parity, Bland–Altman, coverage, intervals."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from dinotrain.metrics.regression import AGREEMENT_95, icc_2_1
from dinotrain.report.drawing import (
    add_axes,
    dots,
    draw_svg,
    paired,
    say_nothing,
    span,
    spread,
)
from dinotrain.report.page import Figure
from dinotrain.report.palette import BLUE, INK, QUIET, VERMILION, series
from dinotrain.report.text import count, number, percent, shorten, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

SIDE_IN = 3.2
"""Small enough that a phone shrinks the drawing little, and its text stays readable."""
EMPTY = "no labelled samples"
_NAME_COLUMNS = 34
MOST_INTERVALS = 120
"""More would run into each other; of more samples every k-th in the order of truth is shown."""


def parity_plot(predicted: ArrayLike, true: ArrayLike, name: str, unit: str) -> Figure:
    """Draw predicted against true values, with MAE and ICC(2,1) above.

    Args:
        predicted: (n,), in ``unit``; rows with NaN in either do not count.
        true: (n,), in ``unit``.
        name: of the value.
        unit: such as mm.
    """
    guess, y = paired(predicted, true)
    mae = float(np.abs(guess - y).mean()) if len(y) else None
    icc = icc_2_1(guess, y)
    facts = f"n = {count(len(y))}, MAE {number(mae)} {unit}, ICC {number(icc)}"

    def paint(canvas: "Canvas") -> None:
        axes = add_axes(canvas, SIDE_IN, SIDE_IN)
        # Not inside the axes, where it could hide an outlier.
        axes.set_title(f"{shorten(name, _NAME_COLUMNS)}\n{facts}", linespacing=1.4)
        axes.set_xlabel(f"true, {unit}")
        axes.set_ylabel(f"predicted, {unit}")
        if not len(y):
            return say_nothing(axes, EMPTY)
        ends = span(guess, y)
        axes.set(xlim=ends, ylim=ends)
        axes.plot(ends, ends, color=QUIET, linewidth=1, dashes=(4, 3))
        dots(axes, y, guess, BLUE)
        return None

    return Figure(
        data=draw_svg(paint),
        caption=f"{name}: predicted against true. Dashed: perfect agreement.",
        alt=f"Parity plot of {name}: {facts}",
    )


def bland_altman(predicted: ArrayLike, true: ArrayLike, name: str, unit: str) -> Figure:
    """Draw differences against means, with bias and 95 % limits of agreement (bias ± 1.96 SD).

    Args:
        predicted: (n,), in ``unit``; rows with NaN in either do not count.
        true: (n,), in ``unit``.
        name: of the value.
        unit: such as mm.

    Source: Bland & Altman 1986.
    """
    guess, y = paired(predicted, true)
    error = guess - y
    lines: dict[str, float] = {}
    if len(y):
        lines["bias"] = float(error.mean())
    if len(y) > 1:
        half = AGREEMENT_95 * float(error.std(ddof=1))
        lines |= {"upper limit": lines["bias"] + half, "lower limit": lines["bias"] - half}
    facts = ", ".join(f"{label} {signed(value, 2)} {unit}" for label, value in lines.items())

    def paint(canvas: "Canvas") -> None:
        axes = add_axes(canvas, SIDE_IN, SIDE_IN)
        axes.set_title(shorten(name, _NAME_COLUMNS))
        axes.set_xlabel(f"mean of predicted and true, {unit}")
        axes.set_ylabel(f"predicted − true, {unit}")
        if not len(y):
            return say_nothing(axes, EMPTY)
        axes.set(xlim=span((guess + y) / 2), ylim=span(error, np.array([0.0, *lines.values()])))
        axes.axhline(0, color=QUIET, linewidth=0.8)
        dots(axes, (guess + y) / 2, error, BLUE)
        _mark_levels(axes, lines)
        return None

    return Figure(
        data=draw_svg(paint),
        caption=f"{name}, Bland–Altman: {facts or EMPTY}.",
        alt=f"Bland–Altman plot of {name}: {facts or EMPTY}",
    )


def coverage_plot(
    curves: Mapping[str, Mapping[str | float, float | None]], caption: str = ""
) -> Figure:
    """Draw how often stated intervals hold against how often they should.

    Args:
        curves: {name: {nominal coverage: empirical coverage}}, as
            ``metrics.uncertainty.evaluate_uncertainty`` gives it; None where there is none.
        caption: what the intervals are, where there is more to say.
    """

    def paint(canvas: "Canvas") -> None:
        axes = add_axes(canvas, SIDE_IN, SIDE_IN)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="stated coverage", ylabel="empirical coverage")
        axes.plot((0, 1), (0, 1), color=QUIET, linewidth=1, dashes=(4, 3))
        for index, (name, curve) in enumerate(curves.items()):
            points = [(float(p), share) for p, share in curve.items() if share is not None]
            axes.plot(
                [p for p, _ in points],
                [share for _, share in points],
                color=series(index),
                marker="osD^vP"[index % 6],
                markersize=4,
                clip_on=False,
                label=shorten(name, _NAME_COLUMNS),
            )
        if curves:
            axes.legend(loc="upper left", bbox_to_anchor=(0.03, 0.97))

    return Figure(
        data=draw_svg(paint),
        caption=caption
        or "Coverage of the stated intervals. Below the dashed line they are too "
        "narrow, above it too wide.",
        alt=f"Coverage curve of {', '.join(curves) or 'nothing'}",
    )


def interval_plot(
    low: ArrayLike, high: ArrayLike, true: ArrayLike, name: str, unit: str, stated: float | None
) -> Figure:
    """Draw the interval of each sample around its true value, in the order of truth.

    Args:
        low: (n,) lower ends; rows with NaN in any of the three do not count.
        high: (n,) upper ends.
        true: (n,).
        name: of the value.
        unit: such as mm.
        stated: coverage that the intervals promise, between 0 and 1, or None.
    """
    bottom, y = paired(low, np.where(np.isfinite(np.asarray(high, np.float64)), true, np.nan))
    top, _ = paired(high, np.where(np.isfinite(np.asarray(low, np.float64)), true, np.nan))
    inside = (bottom <= y) & (y <= top)
    share = float(inside.mean()) if len(y) else None
    order = np.argsort(y, kind="stable")
    shown = order[:: max(1, -(-len(order) // MOST_INTERVALS))]
    promise = "" if stated is None else f", stated {percent(stated, 0)}"
    facts = f"{percent(share)} of {count(len(y))} hold{promise}"

    def paint(canvas: "Canvas") -> None:
        axes = add_axes(canvas, 4.0, SIDE_IN)
        axes.set_title(shorten(f"{name}: {facts}", 54))
        axes.set_xlabel(f"true, {unit}")
        axes.set_ylabel(f"interval − true, {unit}")
        if not len(y):
            return say_nothing(axes, EMPTY)
        for holds, colour in ((True, BLUE), (False, VERMILION)):
            rows = shown[inside[shown] == holds]
            ends = (bottom[rows] - y[rows], top[rows] - y[rows])
            axes.vlines(y[rows], *ends, color=colour, linewidth=1.3 if holds else 2.0)
        axes.axhline(0, color=INK, linewidth=0.8)
        return None

    return Figure(
        data=draw_svg(paint),
        caption=f"{name}: intervals around the true value; {facts}. Thick ones miss it.",
        alt=f"Intervals of {name}: {facts}",
    )


def _mark_levels(axes: "Axes", levels: dict[str, float]) -> None:
    """Draw horizontal lines, their values beside the axes and apart from each other."""
    low, high = axes.get_ylim()
    texts = spread(list(levels.values()), gap=0.1 * (high - low))
    for (label, value), place in zip(levels.items(), texts, strict=True):
        main = label == "bias"
        colour = INK if main else VERMILION
        axes.axhline(value, color=colour, linewidth=1.2, linestyle="-" if main else (0, (4, 2)))
        axes.text(
            1.02,
            (place - low) / (high - low),
            f"{label}\n{signed(value, 2)}",
            transform=axes.transAxes,
            va="center",
            fontsize=8,
            linespacing=1.1,
        )
