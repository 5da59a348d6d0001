"""What a search has found out so far, on disk after each step, so that a killed one goes on.

Simulations are of no target, so that the targets of a checkpoint share them.
"""

from pathlib import Path

import msgspec

from dinoexport.search.front import Candidate
from dinotrain.errors import UsageError

FORMAT_VERSION = 3


class Measured(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Artifacts of one target.

    Attributes:
        candidates: {recipe: what its artifact measured}.
        refused: {recipe: why it cannot be built}.
        timed_in_turns: recipes whose latencies were taken side by side.
    """

    candidates: dict[str, Candidate] = msgspec.field(default_factory=dict)
    refused: dict[str, str] = msgspec.field(default_factory=dict)
    timed_in_turns: list[str] = msgspec.field(default_factory=list)


class SearchState(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Measurements of one search.

    Attributes:
        key: digest of all that they depend on.
        noise: {precision: {group: how much it disturbs the outputs}}.
        drops: {recipe: drop of the simulated model on calibration pictures}.
        targets: {target: what its artifacts measured}.
    """

    format_version: int = FORMAT_VERSION
    key: str
    noise: dict[str, dict[str, float]] = msgspec.field(default_factory=dict)
    drops: dict[str, float] = msgspec.field(default_factory=dict)
    targets: dict[str, Measured] = msgspec.field(default_factory=dict)


def load_state(path: Path, key: str) -> SearchState:
    """Return what an earlier search with the same key left, or an empty state.

    What is of another key, of another version or damaged is not used: it is measured again.
    """
    try:
        state = msgspec.json.decode(path.read_bytes(), type=SearchState)
    except (OSError, msgspec.MsgspecError):
        return SearchState(key=key)
    if state.key != key or state.format_version != FORMAT_VERSION:
        return SearchState(key=key)
    return state


def save_state(path: Path, state: SearchState) -> None:
    """Write a state in one step.

    Raises:
        UsageError: the folder cannot be written.
    """
    partial = path.with_name(f"{path.name}.part")
    try:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(state), indent=1))
        partial.replace(path)
    except OSError as error:
        raise UsageError(
            f"{path.parent}: the search cannot be recorded there ({error.strerror}). "
            "Give another --out."
        ) from error
