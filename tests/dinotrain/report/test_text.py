"""Text from data: nothing in it may break a page, and figures read alike everywhere."""

import math
from xml.etree import ElementTree

import pytest

from dinotrain.report.text import clean, compact, count, number, percent, shorten, signed


def test_control_characters_and_turns_of_direction_are_replaced():
    assert clean("a\u202eb\x00c\ud800d\u2066e\ufffff") == "a�b�c�d�e�f"
    assert clean("line\nbreak\tand\u2028more") == "line break and more"
    assert clean(3.5) == "3.5"


def test_other_scripts_and_emoji_stay():
    for text in ("عيون طبيعية", "目の画像", "γ = 2 – ½", "👁️"):
        assert clean(text) == text


def test_every_character_of_unicode_is_fit_for_xml_and_utf_8():
    everything = clean("".join(map(chr, range(0x110000))))
    escaped = everything.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    ElementTree.fromstring(f"<a>{escaped}</a>".encode())
    # The test can fail: one control character is enough.
    with pytest.raises(ElementTree.ParseError):
        ElementTree.fromstring("<a>\x01</a>")


@pytest.mark.parametrize("length", [3, 4, 8, 25])
@pytest.mark.parametrize("text", ["abcdefghijklmnopqrstuvwxyz" * 3, "目" * 40, "a目" * 20])
def test_shortened_text_keeps_both_ends_and_its_width(text, length):
    short = shorten(text, length)
    wide = sum(2 if character == "目" else 1 for character in short)
    assert wide <= length
    assert "…" in short
    head, tail = short.split("…")
    assert text.startswith(head) and text.endswith(tail)


def test_short_text_is_left_alone():
    assert shorten("s001/L", 6) == "s001/L"


def test_figures():
    assert number(None) == number(math.nan) == "–"
    assert number(-0.0004) == "0.000"
    assert number(-1.25, 2) == "−1.25"
    assert number(12345.678, 1) == "12\u202f345.7"
    assert number(-math.inf) == "−∞"
    assert number(3.2e9) == "3.20e+09"
    assert signed(0.25, 2) == "+0.25"
    assert signed(-0.25, 2) == "−0.25"
    assert signed(0.001, 2) == "0.00"
    assert count(801916) == "801\u202f916"
    assert percent(0.9636) == "96.4 %"
    assert percent(None) == "–"
    assert [compact(n) for n in (950, 9999, 12345, 765725, 4_100_000)] == [
        "950",
        "9999",
        "12.3k",
        "766k",
        "4.1M",
    ]
