"""Where a folder's data come from: those who write one leave a stamp beside the data."""

from pathlib import Path
from typing import Any

import msgspec

STAMP = "dataset.json"


def read_origin(folder: Path) -> tuple[str, bool]:
    """Return what the stamp of a folder says in a few words, and whether its data are synthetic.

    A stamp that cannot be read is none: it is no part of the data.
    """
    stamp = folder / STAMP
    try:
        facts = msgspec.json.decode(stamp.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return "", False
    generator = facts.get("generator")
    if not generator:
        return str(facts.get("source") or ""), False
    return f"synthetic ({generator}, seed {facts.get('seed')})", True
