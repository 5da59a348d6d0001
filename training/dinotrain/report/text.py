"""Text and numbers as a report shows them: names from data made harmless, figures made short.

Names of classes, files and subjects are foreign: they may hold control characters, which no XML
may, and marks that turn the direction of all text after them.
"""

import math
import unicodedata

NOTHING = "–"
"""Stands where a figure is undefined."""

_TURNS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C}
"""Marks that change the direction of text; scripts that run right to left need none."""

_SPACES = "\t\n\r\v\f\x1c\x1d\x1e\x1f\x85\u2028\u2029"


def clean(text: object) -> str:
    """Return text without what a page or an SVG cannot hold; each such character becomes �.

    Lone surrogates are replaced as well: file names that are no UTF-8 have them. All white space
    becomes plain spaces.
    """
    return "".join(_harmless(character) for character in str(text))


def shorten(text: object, length: int) -> str:
    """Cut text in its middle to at most ``length`` columns, where East Asian characters take two.

    Names of files and classes often differ at their ends only.
    """
    whole = clean(text)
    if _columns(whole) <= length:
        return whole
    keep = max(length - 1, 2)
    head, tail = "", ""
    for character in whole:
        if _columns(head + character) > keep - keep // 2:
            break
        head += character
    for character in reversed(whole):
        if _columns(character + tail) > keep // 2:
            break
        tail = character + tail
    return f"{head}…{tail}"


def number(value: float | None, digits: int = 3) -> str:
    """Write a figure with a fixed count of decimals, and a dash where there is none."""
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value and abs(value) >= 1e7:
        return f"{value:.2e}".replace("-", "−")
    # Not "−0.00".
    return f"{round(value, digits) + 0.0:,.{digits}f}".replace(",", "\u202f").replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    """Write a figure with its sign."""
    text = number(value, digits)
    return f"+{text}" if value is not None and round(value, digits) > 0 else text


def count(value: int) -> str:
    """Write a count, its thousands apart."""
    return number(value, 0)


def percent(share: float | None, digits: int = 1) -> str:
    """Write a share between 0 and 1 in percent."""
    return NOTHING if share is None or math.isnan(share) else f"{number(100 * share, digits)} %"


def compact(value: int) -> str:
    """Write a count in at most four characters or so: 950, 12.3k, 4.1M."""
    for limit, unit in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if value >= limit:
            scaled = value / (10**3 if unit == "k" else limit)
            return f"{scaled:.1f}{unit}" if scaled < 100 else f"{scaled:.0f}{unit}"
    return str(value)


def _harmless(character: str) -> str:
    if character in _SPACES:
        return " "
    refused = unicodedata.category(character) in ("Cc", "Cs") or ord(character) in _TURNS
    return "�" if refused or ord(character) & 0xFFFE == 0xFFFE else character


def _columns(text: str) -> int:
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)
