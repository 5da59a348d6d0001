"""How plots are drawn: matplotlib without its global state, to an SVG of reproducible bytes.

Only the object interface is used, never pyplot, and matplotlib is imported when the first plot is
drawn: it takes half a second that no other command should wait for.
"""

import io
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinotrain.errors import ShapeError
from dinotrain.report.palette import INK, QUIET, RULE, THEMED
from dinotrain.report.text import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Values = NDArray[np.float64]

MANY_POINTS = 1500
"""From here on points are drawn as pixels: as SVG elements they would weigh megabytes."""

_STYLE = {
    "svg.hashsalt": "dinotrain",
    # Text stays text: small, and in whatever script; the browser has the fonts.
    "svg.fonttype": "none",
    # A class may be called "$x$".
    "text.parse_math": False,
    "text.usetex": False,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.0,
    "legend.fontsize": 8.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "savefig.dpi": 200,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.8,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.borderaxespad": 0.0,
}


def draw_svg(paint: "Callable[[Figure], None]") -> bytes:
    """Draw and return an SVG, cut to what was drawn; the same drawing gives the same bytes.

    Args:
        paint: adds axes of a fixed size to an empty figure; see ``add_axes``.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    # A user's own style file must change no report; what concerns windows is left alone.
    defaults = {
        key: value
        for key, value in matplotlib.rcParamsDefault.items()
        if not key.startswith(("backend", "interactive", "toolbar", "webagg", "tk.", "macosx"))
    }
    data = io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context():
        # The font that measures text lacks many scripts; the browser that shows it does not.
        warnings.simplefilter("ignore")
        matplotlib.rcParams.update(defaults | _STYLE)  # type: ignore[call-overload]
        # One inch: places of axes, which are given as shares of it, are inches then.
        figure = Figure(figsize=(1, 1))
        paint(figure)
        for text in figure.findobj(Text):
            text.set_text("\n".join(map(clean, text.get_text().split("\n"))))
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(data, format="svg", metadata=nothing, bbox_inches="tight", pad_inches=0.04)
    text = data.getvalue().decode()
    for colour, variable in THEMED.items():
        text = text.replace(f": {colour}", f": var({variable}, {colour})")
    return text.encode()


def add_axes(figure: "Figure", width_in: float, height_in: float, top_in: float = 0.0) -> "Axes":
    """Add axes of a fixed size in inches, ``top_in`` below the top of the figure.

    Labels lie outside of them; ``draw_svg`` grows the drawing to what they take.
    """
    return figure.add_axes((0.0, -top_in - height_in, width_in, height_in))


def say_nothing(axes: "Axes", reason: str) -> None:
    """Leave axes empty but for a reason."""
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.text(0.5, 0.5, reason, transform=axes.transAxes, ha="center", va="center", color=QUIET)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Move labels apart so that neighbours have at least ``gap``, and none moves further than due.

    Args:
        places: where each would stand, in any order.
        gap: least distance, in the same unit.
    """
    order = sorted(range(len(places)), key=lambda index: places[index])
    # Least squares under an order: pool neighbours that would collide, and centre each pool.
    pools: list[list[float]] = []
    for rank, index in enumerate(order):
        pools.append([places[index] - rank * gap])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    settled = [float(np.mean(pool)) for pool in pools for _ in pool]
    result = [0.0] * len(places)
    for rank, index in enumerate(order):
        result[index] = settled[rank] + rank * gap
    return result


def paired(predicted: ArrayLike, true: ArrayLike) -> tuple[Values, Values]:
    """Return the rows where both are finite, as float64.

    Raises:
        ShapeError: the two are not (n,) of one length.
    """
    first, second = np.asarray(predicted, np.float64), np.asarray(true, np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise ShapeError(
            f"predicted {first.shape} and true {second.shape} must be (n,) of one length"
        )
    kept = np.isfinite(first) & np.isfinite(second)
    return first[kept], second[kept]


def span(*values: Values, part: float = 0.06) -> tuple[float, float]:
    """Lower and upper end of axes that show all values, with a margin; never of no width."""
    everything = np.concatenate([np.ravel(value) for value in values])
    low, high = float(everything.min()), float(everything.max())
    margin = part * (high - low) or max(abs(high) * part, 0.5)
    return low - margin, high + margin


def dots(axes: "Axes", x: Values, y: Values, colour: str) -> None:
    """Draw points that stay readable where they are many."""
    size, alpha = (14, 0.65) if len(x) < 300 else (7, 0.45) if len(x) < MANY_POINTS else (4, 0.3)
    axes.scatter(
        x, y, s=size, color=colour, alpha=alpha, linewidths=0, rasterized=len(x) >= MANY_POINTS
    )
