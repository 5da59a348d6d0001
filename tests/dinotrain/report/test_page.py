"""The page: whole, self-contained, and proof against whatever data are called."""

import io

import numpy as np
import pytest
from PIL import Image

from dinotrain.errors import DataError, ShapeError, UsageError
from dinotrain.report.agreement_plots import bland_altman, parity_plot
from dinotrain.report.page import (
    Figure,
    Gallery,
    Picture,
    Report,
    Section,
    Table,
    render_page,
    write_report,
)

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "</svg></style></title><b>",
    "' onload='alert(3)",
    "&lt;b&gt; &amp;",
    "\u202eevil\x00\ud800",
    "$x^{2$",
    "a" * 500,
    "عيون",
    "]]> <!-- ",
    "",
]


def png() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 4), "red").save(data, "PNG")
    return data.getvalue()


def report(text: str) -> Report:
    values = np.linspace(0, 1, 9)
    plots = [
        parity_plot(values, values + 0.1, text, text),
        bland_altman(values, values, text, "mm"),
    ]
    table = Table(columns=[text, "n"], rows=[[text, 3], [None, 0.5]], caption=text, quiet=[1])
    gallery = Gallery(
        pictures=[Picture(data=png(), caption=f"{text}\ntrue", width_px=8)],
        caption=text,
        legend=[(text, "#0072b2")],
    )
    raster = Figure(data=png(), caption=text, alt=text)
    section = Section(
        title=text, text=f"{text}\n\nmore", tables=[table], figures=[*plots, gallery, raster]
    )
    return Report(title=text, notice=text, facts={text: text, "n": 3}, sections=[section] * 3)


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_from_data_breaks_the_page(text, read_page):
    page = read_page(render_page(report(text)))
    assert page.problems == []
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 6
    assert len([tag for tag, _ in page.tags if tag == "section"]) == 3


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ("<script>1</script>", "<script>"),
        ("<img src='https://example.org/a.png'>", "img loads https"),
        ("<p onclick='1'></p>", "p has onclick"),
        ("<p>", "closes nothing"),
        ("<i id='part-1'></i>", "id part-1 twice"),
        ("<g clip-path='url(#lost)'></g>", "nothing is called lost"),
        ("<style>@import 'a.css'</style>", "style loads"),
    ],
)
def test_the_reader_finds_planted_faults(planted, found, read_page):
    whole = render_page(report("fine"))
    page = read_page(whole.replace("<main>", f"<main>{planted}"))
    assert found in " ".join(page.problems)


def test_what_was_said_is_there(read_page):
    page = read_page(render_page(report("an <odd> name & more")))
    assert page.texts.count("an <odd> name & more") >= 20
    assert {"–", "0.500", "3", "more"} <= set(page.texts)


def test_the_page_forbids_network_and_scripts_itself():
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert f'content="{policy}"' in render_page(report("x"))


def test_columns_of_numbers_are_set_right_and_baselines_are_quiet(read_page):
    table = Table(
        columns=["name", "value", "mixed", "range"],
        rows=[["a", "−1.5 %", "1", "−1 … +2"], ["b", "–", "x", "–"]],
        quiet=[1],
    )
    page = read_page(render_page(Report(title="t", sections=[Section(title="s", tables=[table])])))
    heads = [attrs.get("class") for tag, attrs in page.tags if attrs.get("scope") == "col"]
    assert heads == [None, "number", None, "number"]
    assert [attrs.get("class") for tag, attrs in page.tags if tag == "tr"] == [None, None, "quiet"]


def test_the_same_report_gives_the_same_bytes():
    assert render_page(report("x")) == render_page(report("x"))


def test_wide_drawings_scroll_and_narrow_ones_shrink():
    def page(width: str) -> str:
        svg = f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' viewBox='0 0 9 9'/>"
        figure = Figure(data=svg.encode(), caption="c", alt="a")
        return render_page(Report(title="t", sections=[Section(title="s", figures=[figure])]))

    assert '<figure class="wide" style="--natural:900px">' in page("900px")
    assert '<figure style="--natural:300px">' in page("300px")


def test_a_row_that_does_not_fit_is_refused():
    table = Table(columns=["a", "b"], rows=[["1", "2"], ["1"]], caption="figures")
    with pytest.raises(ShapeError, match=r"row 1 of table 'figures' has 1 cells; 2"):
        render_page(Report(title="t", sections=[Section(title="s", tables=[table])]))


def test_the_file_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "new" / "report.html"
    assert write_report(path, report("first")) == path
    before = path.read_bytes()
    broken = Section(title="s", figures=[Figure(data=b"no picture", caption="", alt="")])
    with pytest.raises(DataError):
        write_report(path, Report(title="t", sections=[broken]))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "report.html", tmp_path / "folder"):
        with pytest.raises(UsageError, match="the report cannot be written"):
            write_report(path, report("x"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
