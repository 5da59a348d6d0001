"""A training run between two epochs, as one file beside its output, so that a killed run goes on.

Tensors in safetensors, the rest as JSON in its header; never pickle.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dinotrain.errors import CheckpointError, UsageError

FORMAT_VERSION = 1
Tensors = dict[str, Tensor]


class EpochLog(msgspec.Struct, frozen=True, kw_only=True):
    """What one epoch came to; ``val_error`` is the mean over targets, in their unit."""

    epoch: int
    loss: float
    val_error: float | None
    figures: dict[str, float] = {}
    """What ``Objective.diagnose`` tells."""


class Journal(msgspec.Struct, kw_only=True):
    """The part of a state that is no tensor. Epochs count from 1; 0 means none yet."""

    format_version: int = FORMAT_VERSION
    identity: dict[str, Any] = {}
    """The recipe, and the digests of data and backbone."""
    epoch: int = 0
    best_epoch: int = 0
    best_error: float | None = None
    stopped: str = ""
    """Why training ended before its last epoch."""
    log: list[EpochLog] = []


class TrainingState(msgspec.Struct, kw_only=True):
    """Weights now, the best weights so far, the optimizer's moments, and the journal."""

    journal: Journal
    weights: Tensors
    best: Tensors
    moments: dict[int, Tensors]


def state_path(out: Path) -> Path:
    """Return where the state of a run stands: beside its output, hidden."""
    return out.with_name(f".{out.stem}.training.safetensors")


def save_state(state: TrainingState, path: Path) -> None:
    """Write a state in one step."""
    tensors = {f"weights/{name}": value for name, value in state.weights.items()}
    tensors |= {f"best/{name}": value for name, value in state.best.items()}
    for index, moments in state.moments.items():
        tensors |= {f"moments/{index}/{name}": value for name, value in moments.items()}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    journal = msgspec.json.encode(state.journal).decode()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial_name = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
    os.close(handle)
    partial = Path(partial_name)
    try:
        save_file(tensors, partial, metadata={"journal": journal})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_state(path: Path, identity: dict[str, Any]) -> TrainingState:
    """Read a state and check that it belongs to this run.

    Args:
        path: as ``state_path`` names it.
        identity: what the run that goes on is made of.

    Raises:
        UsageError: there is no state, or it is of a run with another recipe, data or backbone; the
            first differing choice is named.
        CheckpointError: the file is damaged.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no interrupted training to resume. Start it without --resume.")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {})["journal"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        journal = msgspec.json.decode(text, type=Journal)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: the saved training is damaged. Delete it and train again without --resume."
        ) from error
    _check_identity(path, journal, identity)
    state = TrainingState(journal=journal, weights={}, best={}, moments={})
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "moments":
            index, _, name = name.partition("/")
            state.moments.setdefault(int(index), {})[name] = value
        else:
            (state.weights if kind == "weights" else state.best)[name] = value
    return state


def _check_identity(path: Path, journal: Journal, identity: dict[str, Any]) -> None:
    # Through JSON, so that tuples and lists compare equal.
    wanted = msgspec.json.decode(msgspec.json.encode(identity))
    for key in sorted(wanted.keys() | journal.identity.keys()):
        before, now = journal.identity.get(key), wanted.get(key)
        if before != now:
            raise UsageError(
                f"{path}: the interrupted training had {key} = {before}, this one has {now}. "
                "Resume with the same choices, or start anew without --resume."
            )
