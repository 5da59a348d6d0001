"""The confusion matrix, readable for two classes as for thirty."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinotrain.errors import ShapeError
from dinotrain.report.drawing import add_axes, draw_svg, say_nothing
from dinotrain.report.page import Figure
from dinotrain.report.palette import BLUE, INK, QUIET, RULE
from dinotrain.report.text import compact, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

MOST_LABELLED = 40
"""With more classes cells have no room for figures: shading alone is drawn."""

_CELL_IN, _LEAST_CELL_IN, _SIDE_IN = 0.56, 0.33, 9.9
"""Thirty classes just fit across the page; more scroll."""
_WIDE_CELL_IN, _FEW, _ROOMY = 0.8, 5, 12
_DENSE_IN = 6.0
_ROW_NAME, _COLUMN_NAME = 26, 18


def confusion_matrix(matrix: ArrayLike, names: Sequence[str], what: str = "samples") -> Figure:
    """Draw counts and row shares; the shading is the share of the row.

    Args:
        matrix: (classes, classes), counts, rows true, columns predicted.
        names: of the classes.
        what: is counted.

    Raises:
        ShapeError: the matrix does not fit the names.
    """
    counts = np.asarray(matrix, np.int64)
    if counts.shape != (len(names), len(names)):
        raise ShapeError(
            f"the confusion matrix is {counts.shape}; ({len(names)}, {len(names)}) is needed for "
            f"{len(names)} classes"
        )
    if not len(names):
        raise ShapeError("a confusion matrix needs classes, and there are none")
    total = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(total, 1)
    small = len(names) <= MOST_LABELLED

    def paint(canvas: "Canvas") -> None:
        side = _DENSE_IN
        if small:
            most = _WIDE_CELL_IN if len(names) <= _FEW else _CELL_IN
            side = len(names) * min(max(_SIDE_IN / len(names), _LEAST_CELL_IN), most)
        axes = add_axes(canvas, max(side, 1.0), max(side, 1.0))
        axes.set(xlabel="predicted", ylabel="true")
        axes.grid(visible=False)
        if not counts.any():
            return say_nothing(axes, f"no labelled {what}")
        for edge in axes.spines.values():
            edge.set(visible=True, color=RULE)
        if small:
            _cells(axes, counts, shares)
            _name_axes(axes, names)
        else:
            _shade(axes, shares)
        axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5))
        return None

    cells = f"Cells: {what} and their share of the row in percent. "
    if not small:
        cells = "Classes are numbered from 0. "
    right = int(np.trace(counts))
    return Figure(
        data=draw_svg(paint),
        caption=f"Confusion: rows are true, columns predicted. {cells}The stronger the "
        "blue, the larger the share.",
        alt=f"Confusion matrix of {len(names)} classes: {right} of {int(counts.sum())} {what} are "
        "on the diagonal",
    )


def _cells(axes: "Axes", counts: NDArray[np.int64], shares: NDArray[np.float64]) -> None:
    from matplotlib.patches import Rectangle

    large = len(counts) <= _ROOMY
    for row, column in zip(*np.nonzero(counts), strict=True):
        share = float(shares[row, column])
        # Transparency, so that the shading stands on a light and on a dark page; one rectangle a
        # cell, because an embedded picture would be smoothed when enlarged.
        place = (column - 0.5, row - 0.5)
        axes.add_patch(Rectangle(place, 1, 1, facecolor=BLUE, alpha=0.06 + 0.94 * share, lw=0))
        # On a light page white is the clearer one only from here on; ink is light on a dark page.
        ink = "white" if share > 0.85 else INK
        number = str(int(counts[row, column]))
        if len(number) > (6 if large else 4):
            number = compact(int(counts[row, column]))
        size = 8.5 if large else 7.5
        look = {"ha": "center", "va": "center", "color": ink, "in_layout": False}
        axes.text(column, row - 0.14, number, fontsize=size, **look)
        label = "<1" if share < 0.005 else f"{100 * share:.0f}"
        label += " %" if large else ""
        axes.text(column, row + 0.24, label, fontsize=6.5, **look)
    lines = np.arange(len(counts) + 1) - 0.5
    axes.hlines(lines, -0.5, len(counts) - 0.5, color=RULE, linewidth=0.5)
    axes.vlines(lines, -0.5, len(counts) - 0.5, color=RULE, linewidth=0.5)


def _shade(axes: "Axes", shares: NDArray[np.float64]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    shading = LinearSegmentedColormap.from_list("", [(0, 0.45, 0.7, 0.0), (0, 0.45, 0.7, 1.0)])
    # A rare confusion must still be seen.
    axes.pcolormesh(np.sqrt(shares), cmap=shading, vmin=0, vmax=1, rasterized=True)
    for mesh in axes.collections:
        from matplotlib.transforms import Affine2D

        mesh.set_transform(Affine2D().translate(-0.5, -0.5) + axes.transData)
    axes.tick_params(labelcolor=QUIET)


def _name_axes(axes: "Axes", names: Sequence[str]) -> None:
    places = range(len(names))
    axes.set_yticks(places, [shorten(name, _ROW_NAME) for name in names])
    columns = [shorten(name, _COLUMN_NAME) for name in names]
    # Side by side while each fits over its column, else upright.
    room = 11 if len(names) <= _FEW else 8 if len(names) <= _ROOMY else 4
    upright = max(map(len, columns)) > room
    # Anchored at their ends: browsers' fonts are not as wide as the one that measures here.
    turn = {"rotation": 90, "rotation_mode": "anchor", "ha": "right", "va": "center"}
    axes.set_xticks(places, columns, **(turn if upright else {}))
    axes.tick_params(length=0)
