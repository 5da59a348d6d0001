"""Plots of training runs: curves of one, learning rates of a sweep, seeds of a study."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dinotrain.report.drawing import add_axes, draw_svg, say_nothing, span
from dinotrain.report.page import Figure
from dinotrain.report.palette import BLUE, INK, QUIET, VERMILION, series
from dinotrain.report.text import number, percent, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure as Canvas

_WIDTH_IN, _PANEL_IN = 4.0, 1.5
_LOG_FROM = 50
"""A loss that falls by this factor is drawn on a logarithmic scale."""
_MARKS = "osD^vP"
_ROW_IN, _GROUP_GAP_IN = 0.24, 0.34
_NAME_COLUMNS = 34

Log = Mapping[str, Sequence[float | None]]


def training_curves(
    log: Log, error_name: str, unit: str = "", best_epoch: int | None = None
) -> Figure:
    """Draw training loss and validation error over epochs, the best epoch marked.

    Args:
        log: {"epoch", "loss", "val_error"}, one value per epoch; None where there is none.
        error_name: of the validation error; lower is better.
        unit: of the validation error, or nothing.
        best_epoch: the one that was kept; that of the lowest error where None.
    """
    epochs = [float(value) for value in log.get("epoch", ()) if value is not None]
    losses = _column(log, "loss", len(epochs))
    errors = _column(log, "val_error", len(epochs))
    judged = bool(np.isfinite(errors).any())
    if best_epoch is None and judged:
        best_epoch = round(epochs[int(np.nanargmin(np.where(np.isinf(errors), np.nan, errors)))])
    at = epochs.index(best_epoch) if best_epoch is not None and best_epoch in epochs else None
    label = f"{error_name}, {unit}" if unit else error_name
    best = ""
    if at is not None:
        value = f"{number(errors[at], 4)} {unit}".strip() if judged else ""
        best = f"best epoch {best_epoch}" + (f": {value}" if value else "")

    def paint(canvas: "Canvas") -> None:
        panels = [("training loss", losses, BLUE)]
        if judged:
            panels.append((f"validation {label}", errors, VERMILION))
        axes, ends = None, span(np.array(epochs)) if epochs else (0.0, 1.0)
        for place, (title, values, colour) in enumerate(panels):
            axes = add_axes(canvas, _WIDTH_IN, _PANEL_IN, place * (_PANEL_IN + 0.42))
            axes.set_title(shorten(title, 62))
            if not epochs:
                say_nothing(axes, "no epoch was finished")
                continue
            _curve(axes, epochs, values, colour)
            axes.set_xlim(*ends)
            if at is not None:
                axes.axvline(epochs[at], color=QUIET, linewidth=1, dashes=(3, 2))
                axes.plot(epochs[at], values[at], "o", color=INK, markersize=5)
            if place < len(panels) - 1:
                axes.tick_params(labelbottom=False)
        if axes is not None and epochs:
            axes.set_xlabel("epoch")

    return Figure(
        data=draw_svg(paint),
        caption=f"Training loss and validation {label}." + (f" Dashed: {best}." if best else ""),
        alt=f"Training curves over {len(epochs)} epochs" + (f"; {best}" if best else ""),
    )


def learning_rate_sweep(table: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw the accuracy of a linear probe over learning rates, one line per kind of features.

    Args:
        table: {features: {rate: accuracy between 0 and 1}}, as ``probe`` gives it.
    """
    points = [
        (accuracy, kind, float(rate))
        for kind, rates in table.items()
        for rate, accuracy in rates.items()
        if math.isfinite(accuracy)
    ]
    top = max(points, key=lambda point: point[0], default=None)
    best = f"best: {top[1]} at {top[2]:g}, {percent(top[0])}" if top else "nothing was swept"

    def paint(canvas: "Canvas") -> None:
        axes = add_axes(canvas, _WIDTH_IN, 2.4)
        axes.set_title(shorten(best, 62))
        if top is None:
            return say_nothing(axes, "no figures")
        for index, (kind, rates) in enumerate(table.items()):
            ordered = sorted((float(rate), accuracy) for rate, accuracy in rates.items())
            axes.plot(
                [rate for rate, _ in ordered],
                [100 * accuracy for _, accuracy in ordered],
                color=series(index),
                marker=_MARKS[index % len(_MARKS)],
                markersize=4,
                label=shorten(kind, _NAME_COLUMNS),
            )
        axes.set_xscale("log")
        _plain(axes.xaxis)
        axes.set(xlabel="learning rate", ylabel="accuracy, %")
        axes.plot(top[2], 100 * top[0], "o", mfc="none", mec=INK, markersize=10)
        _legend_below(axes, len(table))
        return None

    return Figure(
        data=draw_svg(paint),
        caption=f"Linear probe, accuracy on the validation split; {best}.",
        alt=f"Accuracy over learning rates; {best}",
    )


def grouped_points(
    table: Mapping[str, Mapping[str, Sequence[float | None]]], label: str, digits: int = 3
) -> Figure:
    """Draw the values of several seeds per configuration, with their mean and spread.

    Args:
        table: {group: {variant: values per seed}}; None and NaN are runs that failed, and a
            variant without values has no such figure.
        label: what the values are, with their unit.
        digits: decimals of the means.
    """
    variants = list(dict.fromkeys(variant for rows in table.values() for variant in rows))
    heights = [_GROUP_GAP_IN + _ROW_IN * len(rows) for rows in table.values()]
    height = max(sum(heights) + 0.1, 1.0)

    def paint(canvas: "Canvas") -> None:
        axes = add_axes(canvas, 3.6, height)
        axes.set(xlabel=shorten(label, 62), ylim=(height, 0), yticks=[])
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False, axis="y")
        place, shown = 0.0, False
        for group, rows in table.items():
            _beside(axes, -0.02, place + 0.2, shorten(group, _NAME_COLUMNS), weight="bold")
            place += _GROUP_GAP_IN
            for variant, values in rows.items():
                known = _known(values)
                shown |= len(known) > 0
                _beside(axes, -0.02, place + _ROW_IN / 2, shorten(variant, _NAME_COLUMNS))
                _beside(axes, 1.03, place + _ROW_IN / 2, _summary(values, digits), side="left")
                _seeds(axes, known, place + _ROW_IN / 2, series(variants.index(variant)))
                place += _ROW_IN
        if not shown:
            say_nothing(axes, "no figures")

    runs = sum(len(_known(values)) for rows in table.values() for values in rows.values())
    return Figure(
        data=draw_svg(paint),
        caption=f"{label}: each dot is a seed, the bar their mean, the line ± one standard "
        "deviation; right: mean ± standard deviation (seeds).",
        alt=f"{label} of {runs} runs in {len(table)} groups",
    )


def _column(log: Log, name: str, length: int) -> np.ndarray:
    values = [math.nan if value is None else float(value) for value in log.get(name, ())]
    return np.array([*values[:length], *[math.nan] * (length - len(values))])


def _curve(axes: "Axes", epochs: list[float], values: np.ndarray, colour: str) -> None:
    from matplotlib.ticker import MaxNLocator

    finite = values[np.isfinite(values)]
    # A single epoch makes no line; few are clearer with their points.
    axes.plot(epochs, values, color=colour, marker="o" if len(epochs) < 30 else "", markersize=3)
    if len(finite) and finite.min() > 0 and finite.max() > _LOG_FROM * finite.min():
        axes.set_yscale("log")
        _plain(axes.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))


def _plain(axis: "Axis") -> None:
    """Write the decades of a logarithmic axis as they are; powers would need a formula."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend_below(axes: "Axes", lines: int) -> None:
    axes.legend(
        loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2 if lines > 3 else 1, columnspacing=1.5
    )


def _known(values: Sequence[float | None]) -> np.ndarray:
    numbers = np.array([math.nan if value is None else value for value in values], np.float64)
    return numbers[np.isfinite(numbers)]


def _summary(values: Sequence[float | None], digits: int) -> str:
    if not len(values):
        return "no figure"
    known = _known(values)
    missing = len(values) - len(known)
    text = "no figure" if not len(known) else number(float(known.mean()), digits)
    if len(known) > 1:
        text += f" ± {number(float(known.std(ddof=1)), digits)}"
    text += f" ({len(known)})"
    return text + (f", {missing} failed" if missing else "")


def _seeds(axes: "Axes", known: np.ndarray, row: float, colour: str) -> None:
    if not len(known):
        return
    mean = float(known.mean())
    if len(known) > 1:
        sd = float(known.std(ddof=1))
        axes.plot([mean - sd, mean + sd], [row, row], color=colour, linewidth=1.2)
    axes.plot(known, [row] * len(known), "o", color=colour, markersize=5, alpha=0.65, mew=0)
    axes.plot([mean, mean], [row - 0.085, row + 0.085], color=INK, linewidth=2)


def _beside(
    axes: "Axes", x: float, y: float, text: str, side: str = "right", weight: str = "normal"
) -> None:
    """Write beside the axes: ``x`` as a share of their width, ``y`` as a value."""
    axes.text(
        x,
        y,
        text,
        transform=axes.get_yaxis_transform(),
        ha=side,
        va="center",
        fontsize=8.5,
        fontweight=weight,
    )
