"""An SVG drawing made fit to stand inside an HTML page, beside others of its kind."""

import re
from xml.etree import ElementTree

from dinotrain.errors import DataError

_REFERENCE = re.compile(r"url\(\s*['\"]?#([^)'\"]+)['\"]?\s*\)")
_UNITS_PX = {"": 1.0, "px": 1.0, "pt": 96 / 72, "in": 96.0}
_LENGTH = re.compile(r"([\d.]+)\s*(px|pt|in)?\s*$")

_DROPPED = ("metadata", "style", "script", "foreignObject")
"""The style that matplotlib writes has the selector ``*``: the page's own style repeats it for
drawings alone. The other two could run code, and no plot has them."""


def pixel_width(svg: bytes) -> int:
    """Width that a drawing asks for, in CSS pixels.

    Raises:
        DataError: this is no SVG, or one without a width.
    """
    found = _LENGTH.match(_root(svg).get("width", ""))
    if not found:
        raise DataError("a drawing has no width; SVG with a width in px, pt or in is accepted")
    return round(float(found[1]) * _UNITS_PX[found[2] or ""])


def inline_svg(svg: bytes, prefix: str, label: str) -> str:
    """Turn an SVG file into an element of an HTML page.

    Its ids get a prefix, because matplotlib gives those of two drawings the same names, and the
    clip of one would cut the other. Scripts and handlers of events are left out.

    Args:
        svg: the file.
        prefix: differs for every drawing of a page.
        label: what it shows, for people who do not see it.

    Raises:
        DataError: this is no SVG.
    """
    root = _root(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if not isinstance(child.tag, str) or _local(child.tag) in _DROPPED:
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(key): value for key, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update(
            {
                key: _renamed(key, value, prefix)
                for key, value in attributes.items()
                if not key.lower().startswith("on") and _local_target(key, value)
            }
        )
    for name in ("version", "width", "height", "id"):
        root.attrib.pop(name, None)
    root.attrib.update({"role": "img", "aria-label": label})
    return ElementTree.tostring(root, encoding="unicode")


def _root(svg: bytes) -> ElementTree.Element:
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise DataError(
            f"a drawing is neither PNG nor well-formed SVG ({error}); draw it again"
        ) from error
    if _local(root.tag) != "svg":
        raise DataError(f"a drawing is <{_local(root.tag)}>; PNG and SVG are accepted")
    return root


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _local_target(key: str, value: str) -> bool:
    """Whether an attribute stays inside the file: no link leads out of it."""
    return key != "href" or value.startswith(("#", "data:image/png"))


def _renamed(key: str, value: str, prefix: str) -> str:
    if key == "id":
        return prefix + value
    if key == "href" and value.startswith("#"):
        return f"#{prefix}{value[1:]}"
    return _REFERENCE.sub(lambda found: f"url(#{prefix}{found[1]})", value)
