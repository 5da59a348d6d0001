"""The recipes of a task side by side on the same data: a frozen backbone against a fine-tuned one.

Each recipe is a preset of the task; each run is an ordinary one, with a checkpoint of its own.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
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
    shared: Mapping[str, Any], out: Path, seeds: int = 1, progress: Progress | None = None
) -> dict[str, list[CheckpointConfig]]:
    """Train every preset of a task with some seeds.

    A comparison that was cut off goes on: finished runs are read, a running one is resumed.

    Args:
        shared: fields of ``TrainConfig``, task, data and backbone among them; they win over the
            presets.
        out: folder of the checkpoints, ``<preset>-<seed>.safetensors``.
        seeds: how many, from 0 on.
        progress: as ``train`` calls it.

    Returns:
        {preset: the headers of its checkpoints, one per seed}.

    Raises:
        UsageError: the task has no presets.
        DinoError: as ``train``.
    """
    task = get_task(shared["task"])
    if not task.presets:
        raise UsageError(f"task {task.name} has no recipes to compare. Use `dinoexport study`.")
    found: dict[str, list[CheckpointConfig]] = {name: [] for name in task.presets}
    # Seed by seed, so that a comparison that is cut off has seen every recipe.
    for seed in range(seeds):
        for name, preset in task.presets.items():
            path = out / f"{name}-{seed}.safetensors"
            fields = {**preset, **shared, "out": path, "name": path.stem, "seed": seed}
            config = TrainConfig(**fields)
            if not path.is_file():
                resume = state_path(path).is_file()
                train(msgspec.structs.replace(config, resume=resume), progress)
            found[name].append(_finished(config))
    return found


def over_seeds(
    headers: Sequence[CheckpointConfig], split: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the mean of every figure of a split over seeds, and its standard deviation.

    Args:
        headers: of one recipe's checkpoints.
        split: ``val`` or ``test``.

    Returns:
        Two trees in the form of the metrics; words and lists, and figures that a seed lacks, are
        left out. The deviations (n − 1) are empty for one seed.
    """
    trees = [header.metrics.get(split, {}) for header in headers]
    mean = _fold(trees, lambda values: sum(values) / len(values))
    return mean, _fold(trees, statistics.stdev) if len(trees) > 1 else {}


def _fold(trees: Sequence[Any], figure: Callable[[list[float]], float]) -> dict[str, Any]:
    folded: dict[str, Any] = {}
    for key in trees[0]:
        values = [tree.get(key) for tree in trees]
        if all(isinstance(value, dict) for value in values):
            folded[key] = _fold(values, figure)
        elif all(isinstance(value, int | float) for value in values):
            folded[key] = figure([float(value) for value in values])
    return folded


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
