"""How commands print results and errors: text or one JSON object on stdout, one line on stderr."""

import json
import os
import sys
from typing import Any

import typer
from dinotrain.errors import DinoError, UsageError

PASSED, FAILED, UNDECIDED = 0, 1, 2


def run_app(app: typer.Typer) -> int:
    """Run the command line; every error becomes one line and a status."""
    as_json = "--json" in sys.argv[1:]
    try:
        app()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else UNDECIDED
    except DinoError as error:
        return _fail(str(error), as_json)
    except KeyboardInterrupt:
        return _fail("interrupted; what was there before is unchanged", as_json, status=130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return UNDECIDED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", as_json)
    except MemoryError:
        return _fail("out of memory. Use a smaller --image-size or backbone", as_json)
    except Exception as error:
        if os.environ.get("DINOEXPORT_TRACEBACK"):
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return _fail(
            f"internal error ({text}). Please report it, with what DINOEXPORT_TRACEBACK=1 prints",
            as_json,
        )
    return PASSED


def _fail(message: str, as_json: bool, status: int = UNDECIDED) -> int:
    line = " ".join(message.split())
    if as_json:
        sys.stdout.write(json.dumps({"error": line}) + "\n")
    sys.stderr.write(f"error: {line}\n")
    return status


def print_json(value: Any) -> None:
    """Print one JSON object."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def parse_size(text: str | None) -> tuple[int, int] | None:
    """``224`` or ``224x322`` (height x width) → (height, width).

    Raises:
        UsageError: anything else.
    """
    if text is None:
        return None
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) > 2 or not all(p.isascii() and p.isdigit() and int(p) > 0 for p in parts):
        raise UsageError(
            f"--image-size '{text}' is no size; accepted: N or HxW, such as 224 or 224x322"
        )
    sides = [int(part) for part in parts]
    return sides[0], sides[-1]
