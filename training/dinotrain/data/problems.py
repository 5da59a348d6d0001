"""What is wrong with the files of a data set, collected by a reader and refused in one message."""

from pathlib import Path

from dinotrain.errors import DataError

SHOWN = 10
"""Problems that are told in full."""
NAMED = 200
"""Further files that cannot be read, of which only the place is told."""


class Problems:
    """Collects what is wrong, by file and line; what cannot be read may be left out instead.

    Args:
        source: what is being read, for the message.
        skip_unreadable: whether files that cannot be read are left out; all else is still refused.
    """

    def __init__(self, source: Path, skip_unreadable: bool = False) -> None:
        self.skips = skip_unreadable
        self._source = source
        self._refused: list[tuple[str, int, str, bool]] = []
        self._skipped: list[tuple[str, int, str]] = []

    def __bool__(self) -> bool:
        """Whether there is anything to refuse."""
        return bool(self._refused)

    @property
    def skipped(self) -> tuple[str, ...]:
        """What was left out, a line each, by file and line."""
        return tuple(_line(*entry) for entry in sorted(self._skipped))

    def add(self, file: str, text: str, line: int = 0) -> None:
        """Note what is wrong with a file, or with one of its lines.

        Args:
            file: as its user knows it; nothing for the source itself.
            text: what is wrong.
            line: 1 is the first; 0 is none.
        """
        self._refused.append((file, line, text, False))

    def unreadable(self, file: str, text: str, line: int = 0, then: str = "") -> None:
        """Note a file that cannot be read: refused, or left out where that is allowed.

        Args:
            file: see ``add``.
            text: why it cannot be read.
            line: see ``add``.
            then: what is left out with it.
        """
        if self.skips:
            self._skipped.append((file, line, f"{text} {then}".rstrip()))
        else:
            self._refused.append((file, line, text, True))

    def refuse(self) -> None:
        """Raise DataError where there is anything to refuse."""
        if not self._refused:
            return
        found = sorted(self._refused)
        lines = [_line(file, line, text) for file, line, text, _ in found[:SHOWN]]
        rest = found[SHOWN:]
        if rest:
            places = [_place(file, line) for file, line, _, unreadable in rest if unreadable]
            named = f", of which cannot be read: {', '.join(places[:NAMED])}" if places else ""
            lines.append(f"and {len(rest)} more{named}{' …' if len(places) > NAMED else ''}")
        noun = "problem" if len(found) == 1 else "problems"
        skippable = any(unreadable for *_, unreadable in found)
        hint = "\nWhat cannot be read can be left out: --skip-unreadable." if skippable else ""
        listed = ";\n  ".join(lines)
        raise DataError(f"{self._source}: {len(found)} {noun}:\n  {listed}{hint}")


def _place(file: str, line: int) -> str:
    return " ".join(part for part in (file, f"row {line}" if line else "") if part)


def _line(file: str, line: int, text: str) -> str:
    return f"{_place(file, line)}: {text}"
