"""The recipes of a task side by side on the same data: a frozen backbone against a fine-tuned one.

Each recipe is a preset of the task; each run is an ordinary one, with a checkpoint of its own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from dinotrain.checkpoint import CheckpointConfig, read_config
from dinotrain.errors import UsageError
from dinotrain.features import Progress
from dinotrain.fit import train
from dinotrain.tasks import get_task
from dinotrain.train_config import TrainConfig
from dinotrain.training_state import state_path


def compare_presets(
    shared: Mapping[str, Any], out: Path, progress: Progress | None = None
) -> dict[str, CheckpointConfig]:
    """Train every preset of a task.

    A comparison that was cut off goes on: finished runs are read, a running one is resumed.

    Args:
        shared: fields of ``TrainConfig``, task, data and backbone among them; they win over the
            presets.
        out: folder of the checkpoints, ``<preset>.safetensors``.
        progress: as ``train`` calls it.

    Returns:
        {preset: the header of its checkpoint}.

    Raises:
        UsageError: the task has no presets.
        DinoError: as ``train``.
    """
    task = get_task(shared["task"])
    if not task.presets:
        raise UsageError(f"task {task.name} has no recipes to compare. Use `dinoexport study`.")
    found = {}
    for name, preset in task.presets.items():
        path = out / f"{name}.safetensors"
        config = TrainConfig(**{**preset, **shared, "out": path, "name": name})
        if not path.is_file():
            resume = state_path(path).is_file()
            train(msgspec.structs.replace(config, resume=resume), progress)
        found[name] = _finished(config)
    return found


def _finished(config: TrainConfig) -> CheckpointConfig:
    """Return the header of a run, or UsageError where it is one of another recipe."""
    header = read_config(config.out)
    # Through JSON, so that tuples and lists compare equal.
    recipe = msgspec.json.decode(msgspec.json.encode(config.recipe()))
    # What a run decides for itself where nothing is named: head, features, loss.
    named = {key: value for key, value in recipe.items() if value not in (None, "")}
    differing = [k for k, v in named.items() if k != "features" and header.training.get(k) != v]
    if differing:
        raise UsageError(
            f"{config.out}: was trained with {differing[0]} = {header.training.get(differing[0])}, "
            f"not {named[differing[0]]}. Give another --out."
        )
    return header
