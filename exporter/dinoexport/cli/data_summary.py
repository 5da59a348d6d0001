"""How commands print what is in a data set: text in columns, or one JSON object."""

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import typer

from dinoexport.cli.output import one_line, print_json

if TYPE_CHECKING:
    from dinotrain.data.summary import Summary


def print_summary(data: Path, summary: "Summary", as_json: bool) -> None:
    """Print a data set's splits, classes or labels, and notes.

    In JSON ``classes`` are {class: samples}, and ``class_splits`` the same split by split.

    Args:
        data: where it was read from.
        summary: what is in it.
        as_json: whether one JSON object is wanted.
    """
    if as_json:
        facts = msgspec.to_builtins(summary)
        facts["class_splits"] = facts["classes"]
        facts["classes"] = {name: sum(c.values()) for name, c in summary.classes.items()}
        print_json({"data": str(data)} | facts)
        return
    _say("data", str(data))
    for line in summary_table(summary):
        typer.echo(line)
    _say("fingerprint", summary.fingerprint)
    for note in summary.notes:
        _say("note", note)
    for text in summary.skipped:
        _say("left out", text)


def summary_table(summary: "Summary") -> list[str]:
    """Return lines: samples and subjects by split, then classes or labels in columns."""
    splits = [name for name, count in summary.splits.items() if count]
    held = ", ".join(f"{name} {count}" for name, count in summary.splits.items())
    lines = [
        f"{'samples':12} {summary.samples}",
        f"{'subjects':12} {summary.subjects}",
        f"{'splits':12} {held}",
    ]
    if summary.classes:
        lines += _classes(summary, splits)
    for name, ranges in summary.labels.items():
        for split, found in ranges.items():
            values = (
                f"{found.low:g} to {found.high:g}, mean {found.mean:.3g}"
                if found.low is not None
                else "–"
            )
            lines.append(f"{name:12} {split:5} {found.count:>6} labels  {values}")
    return lines


def _classes(summary: "Summary", splits: list[str]) -> list[str]:
    names = [one_line(name) for name in summary.classes]
    width = max(12, *map(len, names))
    lines = [
        f"{'class':{width}}"
        + "".join(f"{split:>8}" for split in splits)
        + f"  share of {splits[0]} {summary.shares_of}"
    ]
    for name, counts, shares in zip(
        names, summary.classes.values(), summary.shares.values(), strict=True
    ):
        cells = "".join(f"{counts[split]:>8}" for split in splits)
        lines.append(f"{name:{width}}{cells}  {100 * shares[splits[0]]:.3g} %")
    return lines


def _say(label: str, text: str) -> None:
    typer.echo(f"{label:12} {one_line(text)}")
