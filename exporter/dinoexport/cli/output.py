"""How commands print results and errors: text or one JSON object on stdout, one line on stderr."""

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from dinotrain.errors import DinoError, UsageError, unknown_name

PASSED, FAILED, UNDECIDED, INTERRUPTED = 0, 1, 2, 130
OUT_OF_MEMORY = "out of memory. Use a smaller --image-size or backbone, or close other programs"

# Newer typers carry their own copy of click: this finds the one whose errors are raised.
_ArgumentError: type[Exception] = typer.BadParameter.__mro__[1]  # type: ignore[assignment]


def run_app(app: typer.Typer, arguments: Sequence[str] | None = None) -> int:
    """Run the command line; every error becomes one line and a status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    as_json = "--json" in arguments
    _open_streams()
    try:
        status = app(args=arguments, prog_name="dinoexport", standalone_mode=False)
        sys.stdout.flush()
    except DinoError as error:
        return _fail(type(error).__name__, str(error), as_json)
    except _ArgumentError as error:
        message = _describe_argument(error, arguments)
        # Without a message the help was shown, because there were no arguments.
        return _fail("UsageError", message, as_json) if message else UNDECIDED
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except (BrokenPipeError, SystemExit):
        # The reader of stdout has gone; typer turns that into an exit of its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return UNDECIDED
    except OSError as error:
        return _fail(*_describe_system(error), as_json)
    except MemoryError:
        return _fail("MemoryError", OUT_OF_MEMORY, as_json)
    except Exception as error:
        # torch says so with a RuntimeError.
        if "allocate memory" in str(error):
            return _fail("MemoryError", OUT_OF_MEMORY, as_json)
        if os.environ.get("DINOEXPORT_TRACEBACK"):
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        message = f"{text}. Please report it, with what DINOEXPORT_TRACEBACK=1 prints"
        return _fail("InternalError", message, as_json)
    if status == INTERRUPTED:
        message = "stopped by the keyboard; what was there before is unchanged"
        return _fail("Interrupted", message, as_json, INTERRUPTED)
    return status if isinstance(status, int) else PASSED


def print_json(value: Any) -> None:
    """Print one JSON object; a number that is not finite becomes null, as JSON has none."""
    typer.echo(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def print_outputs(prediction: Any, true: Mapping[str, float] | None = None) -> None:
    """Print what an artifact gave, a line per number; of a class map the share of each class.

    Args:
        prediction: a ``Prediction``.
        true: what was to come out, {output: value}, shown beside it.
    """
    rows = [
        (label, number, unit)
        for name, value in prediction.outputs.items()
        for label, number, unit in _numbers(
            name, value, prediction.units[name], prediction.class_names
        )
    ]
    width = max(len(label) for label, _, _ in rows)
    if true:
        typer.echo(f"{'output':{width}} {'measured':>9} {'true':>8}")
    for label, number, unit in rows:
        known = f" {true[label]:8.2f}" if true and label in true else " " * 9 if true else ""
        typer.echo(f"{one_line(label):{width}} {number:9.3f}{known} {unit}")


def _numbers(
    name: str, value: Any, unit: str, classes: Sequence[str]
) -> list[tuple[str, float, str]]:
    if not isinstance(value, list):
        return [(name, value, unit)]
    if isinstance(value[0], list):
        cells = [cell for row in value for cell in row]
        shares = [cells.count(number) / len(cells) for number in range(len(classes))]
        return [(f"{name}: {c}", s, "of the pixels") for c, s in zip(classes, shares, strict=True)]
    named = zip(classes, value, strict=True)
    ranked = sorted(named, key=lambda pair: -pair[1])
    return [(f"{name}: {c}", v, unit) for c, v in ranked]


def one_line(text: str) -> str:
    """Join lines, and show what a terminal would obey (escapes in a file name, say) as ``?``."""
    joined = " ".join(text.split())
    return "".join(c if c.isprintable() or "\ud800" <= c <= "\udfff" else "?" for c in joined)


def one_of(kind: str, value: str, known: Sequence[str]) -> Any:
    """Return ``value`` if it is known.

    Raises:
        UsageError: it is not; the nearest known one is named.
    """
    if value not in known:
        raise unknown_name(kind, value, known)
    return value


def parse_size(text: str | None) -> tuple[int, int] | None:
    """``224`` or ``224x322`` (height x width) → (height, width).

    Raises:
        UsageError: anything else.
    """
    if text is None:
        return None
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) > 2 or not all(_is_side(part) for part in parts):
        raise UsageError(
            f"--image-size '{text}' is no size; accepted: N or HxW in pixels, such as 224 or "
            "224x322"
        )
    sides = [int(part) for part in parts]
    return sides[0], sides[-1]


def check_folder(out: Path, option: str = "--out") -> None:
    """Refuse a folder that cannot be written, before any work is done for it.

    Raises:
        UsageError: a file is in the way, or the place is read-only.
    """
    found = out
    while not found.exists() and found != found.parent:
        found = found.parent
    if not found.is_dir():
        what = "is a file" if found == out else f"cannot be made, because {found} is a file"
        raise UsageError(f"{option} {out} {what}. Give a folder.")
    if not os.access(found, os.W_OK | os.X_OK):
        raise UsageError(f"{option} {out} cannot be written: no permission. Give another folder.")


def check_file(out: Path, suffix: str, option: str = "--out") -> None:
    """Refuse a file that cannot be written, before any work is done for it.

    Raises:
        UsageError: another suffix, a folder is in the way, or its folder cannot be written.
    """
    if out.suffix.lower() != suffix:
        raise UsageError(
            f"{option} {out} does not end in {suffix}. Use {out.name and out.with_suffix(suffix)}."
        )
    if out.is_dir():
        raise UsageError(f"{option} {out} is a folder. Give a file that ends in {suffix}.")
    check_folder(out.parent, f"{option} {out}: its folder")


def _is_side(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 7 and int(text) > 0


def _fail(kind: str, message: str, as_json: bool, status: int = UNDECIDED) -> int:
    line = one_line(message)
    if as_json:
        print_json({"error": line, "kind": kind})
    sys.stderr.write(f"{kind}: {line}\n")
    return status


def _describe_argument(error: Any, arguments: Sequence[str]) -> str:
    """What click says, with the value that it leaves out and the next step."""
    message = error.format_message().strip()
    if not message:
        return ""
    options = getattr(getattr(error, "param", None), "opts", ())
    value = _value_given(options, arguments)
    if value and f"'{value}'" not in message:
        message = message.replace("Invalid value for", f"Invalid value '{value}' for", 1)
    command = error.ctx.command_path if error.ctx else "dinoexport"
    end = "" if message[-1] in ".?" else "."
    return f"{message}{end} See `{command} --help`."


def _value_given(options: Sequence[str], arguments: Sequence[str]) -> str:
    # Of an option that is given twice the last one counts.
    for index, argument in reversed(list(enumerate(arguments))):
        name, separator, value = argument.partition("=")
        if name in options:
            return value if separator else "".join(arguments[index + 1 : index + 2])
    return ""


def _describe_system(error: OSError) -> tuple[str, str]:
    where = f"{error.filename}: " if error.filename else ""
    message = f"{where}{error.strerror or error}. Check the path, its permissions and the space."
    return "OSError", message


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _open_streams() -> None:
    """Stand in for streams that the caller closed, and let no character stop a message."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            setattr(sys, name, os.fdopen(number, "w", closefd=False))
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
