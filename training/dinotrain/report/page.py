"""The page: what a report consists of, and its one self-contained HTML file.

The file asks nothing of the network and runs no script, which its own policy enforces. Every text
may come from data (names of classes, of files) and is escaped here, and nowhere else.
"""

import base64
import os
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from dinotrain.errors import ShapeError, UsageError
from dinotrain.report.svg import inline_svg, pixel_width
from dinotrain.report.text import NOTHING, clean, number

Cell = str | int | float | None

WIDE_PX = 640
"""Drawings wider than this scroll on a phone; narrower ones shrink."""

LONG_WORD = 20
"""Characters; longer words are broken inside table cells."""

SMALL_PX = 240
"""Photographs up to this width stand two by two on a phone."""

_PNG = b"\x89PNG\r\n\x1a\n"
_NUMERIC = set("0123456789.,%+−-–…∞± <e\u202f")
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_CONTENTS_FROM = 3
"""Sections from which on the page has a list of them."""


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """Figures in rows; columns of numbers are set right, and ``quiet`` rows (by number) are grey.

    Quiet rows are what a model is compared with.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    quiet: Sequence[int] = ()


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """A drawing: ``data`` is an SVG as ``drawing.draw_svg`` gives it, or a PNG."""

    data: bytes
    caption: str
    alt: str
    """What it shows, for people who do not see it."""


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """One photograph of a gallery, JPEG or PNG, ``width_px`` wide where there is room.

    Each line of the caption has a direction of its own.
    """

    data: bytes
    caption: str
    width_px: int


class Gallery(msgspec.Struct, frozen=True, kw_only=True):
    """Photographs that flow into as many columns as fit; ``legend`` is (name, ``#rrggbb``)."""

    pictures: Sequence[Picture]
    caption: str
    legend: Sequence[tuple[str, str]] = ()


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the report; blank lines in ``text`` part its paragraphs."""

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Figure | Gallery] = ()


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A whole report: ``notice`` is what readers must not miss, ``facts`` are {label: text}."""

    title: str
    notice: str = ""
    facts: Mapping[str, Any] = {}
    sections: Sequence[Section] = ()


def write_report(path: Path, report: Report) -> Path:
    """Write a report in one step: beside its place, then renamed.

    Args:
        path: of the HTML file; its folder is made.
        report: what it shows.

    Returns:
        ``path``.

    Raises:
        ShapeError: a row of a table does not have one cell per column.
        UsageError: the file cannot be written.
    """
    page = render_page(report).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(page)
        partial.chmod(0o644)
        partial.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def render_page(report: Report) -> str:
    """Return the HTML of a report; the same report gives the same text."""
    names = _Numbers()
    sections = "\n".join(
        _section(section, place, names) for place, section in enumerate(report.sections, start=1)
    )
    style = files("dinotrain.report").joinpath("page.css").read_text(encoding="utf-8")
    notice = f'<p class="notice" role="note">{_text(report.notice)}</p>' if report.notice else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_text(report.title)}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1 dir="auto">{_text(report.title)}</h1>
{notice}
{_facts(report.facts)}
</header>
{_contents(report.sections)}
<main>
{sections}
</main>
</body>
</html>
"""


class _Numbers:
    """Gives every drawing of a page a number of its own."""

    def __init__(self) -> None:
        self._last = 0

    def next(self) -> int:
        self._last += 1
        return self._last


def _facts(facts: Mapping[str, Any]) -> str:
    if not facts:
        return ""
    rows = (
        f'<div><dt dir="auto">{_text(label)}</dt><dd dir="auto">{_text(value)}</dd></div>'
        for label, value in facts.items()
    )
    return f'<dl class="facts">{"".join(rows)}</dl>'


def _contents(sections: Sequence[Section]) -> str:
    if len(sections) < _CONTENTS_FROM:
        return ""
    links = (
        f'<li><a href="#part-{place}" dir="auto">{_text(section.title)}</a></li>'
        for place, section in enumerate(sections, start=1)
    )
    return f'<nav aria-label="Contents"><ol>{"".join(links)}</ol></nav>'


def _section(section: Section, place: int, names: _Numbers) -> str:
    paragraphs = [part for part in section.text.split("\n\n") if part.strip()]
    body = [f'<p dir="auto">{_text(part)}</p>' for part in paragraphs]
    if section.tables:
        body.append(f'<div class="tables">{"".join(map(_table, section.tables))}</div>')
    # Drawings stand side by side; a gallery takes the whole width.
    row: list[str] = []
    for figure in section.figures:
        if isinstance(figure, Figure):
            row.append(_figure(figure, names))
            continue
        body += [*_row(row), _gallery(figure)]
        row = []
    body += _row(row)
    title = f'<h2 dir="auto">{_text(section.title)}</h2>'
    return f'<section id="part-{place}">\n{title}\n' + "\n".join(body) + "\n</section>"


def _row(figures: list[str]) -> list[str]:
    return [f'<div class="figures">{"".join(figures)}</div>'] if figures else []


def _table(table: Table) -> str:
    for place, row in enumerate(table.rows):
        if len(row) != len(table.columns):
            raise ShapeError(
                f"row {place} of table '{clean(table.caption) or clean(list(table.columns))}' has "
                f"{len(row)} cells; {len(table.columns)} are needed, one per column"
            )
    cells = [[_shown(value) for value in row] for row in table.rows]
    numeric = [
        bool(cells) and all(set(row[column]) <= _NUMERIC for row in cells)
        for column in range(len(table.columns))
    ]
    head = "".join(
        f'<th scope="col"{_kind(right)} dir="auto">{_text(name)}</th>'
        for name, right in zip(table.columns, numeric, strict=True)
    )
    body = "\n".join(_cells(row, numeric, i in table.quiet) for i, row in enumerate(cells))
    caption = f'<p class="caption" dir="auto">{_text(table.caption)}</p>' if table.caption else ""
    # The caption stays in place while the table scrolls, which must be reachable by keyboard.
    return (
        f'<div class="table">{caption}'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(table.caption)}">'
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div></div>"
    )


def _cells(row: list[str], numeric: list[bool], quiet: bool) -> str:
    cells = []
    for place, (text, right) in enumerate(zip(row, numeric, strict=True)):
        tag, scope = ("th", ' scope="row"') if place == 0 else ("td", "")
        kind = _kind(right, _is_long(text))
        cells.append(f'<{tag}{scope}{kind} dir="auto">{_text(text)}</{tag}>')
    mark = ' class="quiet"' if quiet else ""
    return f"<tr{mark}>{''.join(cells)}</tr>"


def _kind(right: bool, long: bool = False) -> str:
    names = ["number"] * right + ["long"] * (long and not right)
    return f' class="{" ".join(names)}"' if names else ""


def _is_long(text: str) -> bool:
    """Whether a word must be broken: other words never are, however narrow the page."""
    return max(map(len, text.split()), default=0) > LONG_WORD


def _shown(value: Cell) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, str):
        return value
    return number(value, 0) if isinstance(value, int) else number(value)


def _figure(figure: Figure, names: _Numbers) -> str:
    caption = f'<figcaption dir="auto">{_text(figure.caption)}</figcaption>'
    if figure.data.startswith(_PNG):
        image = f'<img src="{_data_uri(figure.data)}" alt="{_text(figure.alt)}">'
        return f"<figure>{image}{caption}</figure>"
    width = pixel_width(figure.data)
    drawing = inline_svg(figure.data, f"f{names.next()}-", clean(figure.alt))
    kind = ' class="wide"' if width > WIDE_PX else ""
    return (
        f'<figure{kind} style="--natural:{width}px">'
        f'<div class="drawing"{_focus(width)}>{drawing}</div>{caption}</figure>'
    )


def _focus(width: int) -> str:
    return ' tabindex="0"' if width > WIDE_PX else ""


def _gallery(gallery: Gallery) -> str:
    legend = "".join(
        f'<li><span class="swatch" style="background:{_text(colour)}"></span>'
        f"<bdi>{_text(name)}</bdi></li>"
        for name, colour in gallery.legend
    )
    pictures = "".join(
        f'<figure{_size(picture)} style="--natural:{picture.width_px}px">'
        f'<img src="{_data_uri(picture.data)}" alt="{_text(picture.caption)}">'
        f"<figcaption>{_lines(picture.caption)}</figcaption></figure>"
        for picture in gallery.pictures
    )
    return (
        f'<div class="gallery"><p class="caption" dir="auto">{_text(gallery.caption)}</p>'
        + (f'<ul class="legend">{legend}</ul>' if legend else "")
        + f'<div class="pictures">{pictures}</div></div>'
    )


def _size(picture: Picture) -> str:
    return ' class="small"' if picture.width_px <= SMALL_PX else ""


def _lines(text: str) -> str:
    return "".join(f'<span dir="auto">{_text(line)}</span>' for line in text.split("\n"))


def _data_uri(image: bytes) -> str:
    kind = "png" if image.startswith(_PNG) else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _text(value: object) -> str:
    return escape(clean(value), quote=True)


def _unwritable(path: Path, error: OSError) -> UsageError:
    reason = error.strerror or type(error).__name__
    return UsageError(f"{path}: the report cannot be written ({reason}). Give another file.")
