"""The colours of all figures, in one place.

The series are those of Okabe and Ito, told apart with every common colour vision; their black is
left out because it would vanish on a dark page. Source: Okabe & Ito 2008, Color Universal Design.
"""

BLUE, ORANGE, GREEN, VERMILION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
PURPLE, SKY, YELLOW = "#cc79a7", "#56b4e9", "#f0e442"

SERIES = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW)
"""Of lines and points; yellow is last, it is weak on white."""

_CLASSES = (ORANGE, SKY, PURPLE, YELLOW, GREEN, VERMILION, BLUE)
"""Of areas on photographs: the bright ones first, which stand out on dark and on grey."""

IGNORED = "#9a9a9a"
"""Of pixels without a label."""

# Each is replaced by a variable of the page, so that drawings follow its dark and light themes.
INK, QUIET, RULE = "#1c2026", "#68707a", "#d6d8db"
THEMED = {INK: "--ink", QUIET: "--quiet", RULE: "--rule"}

Rgb = tuple[int, int, int]


def series(index: int) -> str:
    """Colour of the ``index``-th series; they repeat after seven."""
    return SERIES[index % len(SERIES)]


def class_colours(count: int, background: int | None = 0) -> list[str]:
    """One colour per class; the background is grey.

    After seven classes the colours return lighter, then darker, and after 21 they repeat.
    """
    colours, place = [], 0
    for number in range(count):
        if number == background:
            colours.append(IGNORED)
            continue
        turn, hue = divmod(place, len(_CLASSES))
        colours.append(_shade(_CLASSES[hue], turn % 3))
        place += 1
    return colours


def rgb(colour: str) -> Rgb:
    """``#rrggbb`` → (r, g, b), 0 to 255."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _shade(colour: str, turn: int) -> str:
    if not turn:
        return colour
    target, part = (255, 0.5) if turn == 1 else (0, 0.45)
    mixed = (round(value + part * (target - value)) for value in rgb(colour))
    return "#" + "".join(f"{value:02x}" for value in mixed)
