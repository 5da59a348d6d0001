"""The names of classes, read from the file beside the data; the place of a name is its id."""

import json
from pathlib import Path

from dinotrain.errors import DataError

MAX_CLASSES = 255
"""Ids are one byte, and 255 means ignore."""

MAX_TEXT_BYTES = 100 * 2**20
SHOWN = 10


def read_classes(path: Path) -> tuple[str, ...]:
    """Read the class names of a folder; the place of a name is its id, 0 being the background.

    ``classes.txt`` has one name a line; ``classes.json`` a list of names, or ``{"0": name, ...}``.

    Raises:
        DataError: no such file or two of them, not readable, ids with gaps, fewer than 2 or more
            than 255 names, a blank or repeated name.
    """
    files = [file for name in ("classes.json", "classes.txt") if (file := path / name).is_file()]
    if len(files) != 1:
        what = "both classes.json and classes.txt; keep one" if files else "no list of classes"
        raise DataError(
            f"{path}: {what}. Write classes.txt with one name a line, the background first."
        )
    file = files[0]
    text = read_text(file)
    names = _json_names(file, text) if file.suffix == ".json" else text.strip("\n").split("\n")
    names = [name.strip() for name in names]
    if not 2 <= len(names) <= MAX_CLASSES:
        raise DataError(
            f"{file}: {len(names)} classes; 2 to {MAX_CLASSES} are accepted, the background first"
        )
    for number, name in enumerate(names):
        if not name or not name.isprintable():
            raise DataError(f"{file}: the name of class {number} is '{name}'. Give it a name.")
        if names.index(name) != number:
            raise DataError(
                f"{file}: '{name}' names both class {names.index(name)} and class {number}. "
                "Give every class its own name."
            )
    return tuple(names)


def read_text(file: Path) -> str:
    """Return a small text file, UTF-8; DataError where it is none."""
    if file.stat().st_size > MAX_TEXT_BYTES:
        raise DataError(f"{file}: larger than 100 MB. Give the file itself.")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: not UTF-8 text (byte {error.start}). Save it in UTF-8."
        ) from error


def _json_names(file: Path, text: str) -> list[str]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON that can be read ({error}).") from error
    if isinstance(found, dict):
        wanted = [str(number) for number in range(len(found))]
        if sorted(found) != sorted(wanted):
            raise DataError(
                f"{file}: the ids are {', '.join(list(found)[:SHOWN])}; they must be 0, 1, 2 … "
                "without a gap"
            )
        found = [found[number] for number in wanted]
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise DataError(f'{file}: a list of names is accepted, or {{"0": name, "1": name, …}}')
    return found
