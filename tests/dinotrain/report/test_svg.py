"""Drawings inside a page: no two share an id, and none can run code or fetch anything."""

from xml.etree import ElementTree

import pytest

from dinotrain.errors import DataError
from dinotrain.report.svg import inline_svg, pixel_width

SVG = b"""<?xml version="1.0"?>
<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"
     width="72pt" height="36pt" viewBox="0 0 72 36" onload="alert(1)">
 <metadata>made today</metadata>
 <defs><style type="text/css">*{stroke: red}</style>
  <clipPath id="p1"><rect width="9" height="9"/></clipPath>
  <path id="dot" d="M 0 0"/></defs>
 <script>alert(2)</script>
 <g clip-path="url(#p1)" style="fill: url('#p1')"><use xlink:href="#dot" x="1"/></g>
 <image xlink:href="https://example.org/a.png"/>
 <image xlink:href="data:image/png;base64,AAAA"/>
 <text onclick="alert(3)">a &lt;script&gt; &amp; b</text>
</svg>"""


def elements(text: str):
    return list(ElementTree.fromstring(text).iter())


def test_ids_and_their_references_get_the_prefix():
    text = inline_svg(SVG, "f7-", "label")
    assert {e.get("id") for e in elements(text)} == {None, "f7-p1", "f7-dot"}
    assert 'clip-path="url(#f7-p1)"' in text
    assert "fill: url(#f7-p1)" in text
    assert 'href="#f7-dot"' in text


def test_nothing_runs_and_nothing_is_fetched():
    text = inline_svg(SVG, "f-", "label")
    assert {e.tag for e in elements(text)} == {
        "svg", "defs", "clipPath", "rect", "path", "g", "use", "image", "text",
    }  # fmt: skip
    assert not [key for e in elements(text) for key in e.attrib if key.startswith("on")]
    assert "https:" not in text and "xmlns" not in text
    assert "data:image/png;base64,AAAA" in text
    # What was planted is seen by the same looks.
    assert b"https:" in SVG and b"onload" in SVG and b"<script>" in SVG


def test_text_stays_escaped_and_the_label_is_there():
    text = inline_svg(SVG, "f-", 'a "b" <c>')
    assert "a &lt;script&gt; &amp; b" in text
    assert elements(text)[0].get("aria-label") == 'a "b" <c>'


@pytest.mark.parametrize(("width", "pixels"), [("72pt", 96), ("1in", 96), ("50px", 50), ("7", 7)])
def test_width(width, pixels):
    assert pixel_width(SVG.replace(b"72pt", width.encode())) == pixels


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"<svg", b"<html/>"])
def test_what_is_no_svg_is_refused(data):
    with pytest.raises(DataError, match="PNG"):
        inline_svg(data, "f-", "")


def test_a_drawing_without_a_width_is_refused():
    with pytest.raises(DataError, match="width"):
        pixel_width(b"<svg xmlns='http://www.w3.org/2000/svg'/>")
