"""What a search measured: candidates, which of them hold the budget, and the Pareto front."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Preference = Literal["size", "speed"]
WIDTH_IN, HEIGHT_IN = 6.4, 4.0
LABEL_IN = 0.14
"""Height of a label, which the next one must not touch."""
LABEL_SHARE = 0.3
"""Of the width, which the longest label takes."""


class Candidate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One artifact that was built and run.

    Attributes:
        recipe: its name, which is all that is needed to build it again.
        size_bytes: of the artifact.
        sha256: of the artifact, see ``artifact_digest``: the same recipe gives the same one again.
        error: on the held-out pictures, in the task's unit.
        latency_ms: median on this host, as the runtime is opened by default; None where the host
            does not run the format as apps do.
    """

    recipe: str
    size_bytes: int
    sha256: str
    error: float
    latency_ms: float | None


def pareto_front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return those that no other one beats in size, latency and error at once, smallest first."""
    front = [
        one
        for one in candidates
        if not any(_beats(other, one) for other in candidates if other is not one)
    ]
    return sorted(front, key=lambda c: (c.size_bytes, c.error))


def choose(candidates: Sequence[Candidate], budget: float, prefer: Preference) -> Candidate | None:
    """Return the smallest or fastest candidate within the budget; None if there is none."""
    held = [candidate for candidate in candidates if candidate.error <= budget]
    if not held:
        return None
    if prefer == "speed":
        return min(held, key=lambda c: (c.latency_ms or 0.0, c.size_bytes))
    return min(held, key=lambda c: (c.size_bytes, c.latency_ms or 0.0, c.error))


def _beats(other: Candidate, one: Candidate) -> bool:
    """At least as good in everything, and better in something."""
    pairs = [(other.size_bytes, one.size_bytes), (other.error, one.error)]
    if other.latency_ms is not None and one.latency_ms is not None:
        pairs.append((other.latency_ms, one.latency_ms))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def front_table(
    candidates: Sequence[Candidate], budget: float, unit: str, chosen: Candidate | None
) -> list[str]:
    """Render candidates as lines of text, those of the front marked with *, the chosen one with >.

    Args:
        candidates: all that were measured.
        budget: largest error that is accepted.
        unit: of the error.
        chosen: what is shipped.
    """
    front = {candidate.recipe for candidate in pareto_front(candidates)}
    width = max([len(c.recipe) for c in candidates] + [6])
    lines = [f"    {'recipe':{width}} {'MB':>8} {'host ms':>8} {'error':>9} {unit}"]
    for candidate in sorted(candidates, key=lambda c: (c.size_bytes, c.error)):
        mark = ">" if candidate == chosen else "*" if candidate.recipe in front else " "
        latency = "-" if candidate.latency_ms is None else f"{candidate.latency_ms:.1f}"
        over = "" if candidate.error <= budget else f"  over {budget:g}"
        lines.append(
            f"  {mark} {candidate.recipe:{width}} {candidate.size_bytes / 1e6:8.2f} {latency:>8} "
            f"{candidate.error:9.3g}{over}"
        )
    return lines


def draw_front(
    candidates: Sequence[Candidate], budget: float, unit: str, chosen: Candidate | None, title: str
) -> bytes:
    """Draw size against error as SVG: the front as a line, the budget as a level.

    The same candidates give the same bytes.
    """
    from dinotrain.report.drawing import add_axes, draw_svg, spread
    from dinotrain.report.palette import BLUE, QUIET, VERMILION

    # Latency is a third axis, which a line through the front of all three would zigzag along.
    flat = [msgspec.structs.replace(candidate, latency_ms=None) for candidate in candidates]
    least = min((c.error for c in candidates if c.error > 0), default=budget)
    level = {c.recipe: max(c.error, least / 2) for c in candidates}

    def paint(figure: "Figure") -> None:
        from matplotlib.ticker import FuncFormatter, NullFormatter

        axes = add_axes(figure, WIDTH_IN, HEIGHT_IN, top_in=0.4)
        axes.set(yscale="log", title=title, xlabel="artifact, MB")
        axes.set_ylabel(f"lost on held-out pictures, {unit}")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        front = pareto_front(flat)
        axes.plot(
            [c.size_bytes / 1e6 for c in front],
            [level[c.recipe] for c in front],
            color=QUIET,
            linewidth=1,
        )
        axes.axhline(budget, color=VERMILION, linewidth=1, linestyle="--")
        axes.annotate(
            f"budget {budget:g} {unit}",
            (1, budget),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
            color=VERMILION,
        )
        for candidate in candidates:
            colour = VERMILION if candidate == chosen else BLUE
            place = (candidate.size_bytes / 1e6, level[candidate.recipe])
            axes.plot(*place, "o", markersize=5, color=colour)
        decades = math.log10(axes.get_ylim()[1] / axes.get_ylim()[0])
        per_inch = decades / HEIGHT_IN
        heights = spread([math.log10(level[c.recipe]) for c in candidates], LABEL_IN * per_inch)
        left, right = axes.get_xlim()
        for candidate, height in zip(candidates, heights, strict=True):
            latency = "" if candidate.latency_ms is None else f", {candidate.latency_ms:.0f} ms"
            place_mb = candidate.size_bytes / 1e6
            # Near the edge a label would leave the picture.
            inward = place_mb > right - LABEL_SHARE * (right - left)
            axes.annotate(
                f"{_short(candidate.recipe)}{latency}",
                (place_mb, 10**height),
                textcoords="offset points",
                xytext=(-6, 0) if inward else (6, 0),
                ha="right" if inward else "left",
                va="center",
                fontsize=7,
                color=VERMILION if candidate == chosen else BLUE,
            )

    return draw_svg(paint)


def _short(recipe: str) -> str:
    return recipe if len(recipe) <= 28 else f"{recipe[:25]}…"
