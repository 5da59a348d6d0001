"""The checkpoints that ship with the package, so that the main job runs offline in one command."""

from importlib.resources import files
from pathlib import Path

from dinotrain.errors import CheckpointError

EMBEDDED = {"eyelid": "eyelid-vitti14_eyes-224.safetensors"}
"""Task → file in ``assets``."""


def embedded_backbone() -> Path:
    """Return a checkpoint whose backbone any task may be trained on."""
    return _asset(next(iter(EMBEDDED.values())))


def embedded_checkpoint(task: str) -> Path:
    """Return the embedded checkpoint of a task.

    Raises:
        CheckpointError: the task has none.
    """
    if task not in EMBEDDED:
        raise CheckpointError(
            f"no checkpoint for task {task} ships with dinoexport. Give one with --checkpoint FILE."
        )
    return _asset(EMBEDDED[task])


def _asset(name: str) -> Path:
    return Path(str(files("dinoexport") / "assets" / name))
