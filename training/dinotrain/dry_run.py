"""What a training run would do, told before it does anything: data, shapes, parameters, cost.

Everything that ``fit.train`` checks is checked here too; nothing is trained, and nothing written.
"""

import copy
import math
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from dinotrain.backbones import load_backbone
from dinotrain.data.dataset import Dataset
from dinotrain.features import FeatureStore, Progress, default_cache, silent
from dinotrain.fit import build_model, decide, make_fabric, read_data
from dinotrain.heads.pool import TapPool
from dinotrain.model import TaskModel
from dinotrain.report.training import report_path
from dinotrain.tasks import get_task
from dinotrain.train_config import TrainConfig
from dinotrain.training_state import state_path

BYTES = {"float32": 4, "float16": 2}
ENTRY_OVERHEAD_BYTES = 256
"""Of one cached file besides its numbers: a header with the digest, the shapes and padding."""


def describe_run(config: TrainConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Work out what a run would do; the backbone that it names is loaded, as the run would.

    Args:
        config: what would be trained.
        progress: told of the stage "check", and of what is in the data.

    Returns:
        Plain values: ``data`` (see ``data.summary.Summary``), ``shapes``, ``parameters``,
        ``steps``, ``cache``, ``recipe`` and ``writes``.

    Raises:
        DinoError: what ``fit.train`` would raise before its first epoch, but for pictures of which
            the backbone gives no numbers.
    """
    make_fabric(config)
    task = get_task(config.task)
    dataset = read_data(config, task, progress or silent, tell=False)
    backbone = load_backbone(config.backbone, config.image_size)
    config = decide(config, backbone)
    model = build_model(config, backbone, dataset.classes)
    objective = task.objective(config, model)
    objective.check(dataset.split("train").labels(task.label_names(dataset.classes)))
    shapes = describe_shapes(model)
    return {
        "task": config.task,
        "backbone": model.config.backbone.name,
        "data": msgspec.to_builtins(task.summarise(dataset)),
        "shapes": shapes,
        "parameters": count_parameters(model),
        "steps": _steps(config, len(dataset.split("train").samples)),
        "cache": _cache(config, model, dataset, shapes),
        # As the checkpoint's header holds it: lists, no tuples.
        "recipe": msgspec.json.decode(msgspec.json.encode(config.recipe())),
        "writes": _writes(config),
    }


def describe_shapes(model: TaskModel) -> dict[str, Any]:
    """Return the shapes that run through a model for one sample, without computing anything.

    Returns:
        {"inputs": {name: shape}, "features": {what: shape} of one picture, "pooled": {what: shape},
        "logits": shape, "outputs": [{name, unit, shape, dtype}]}. Intervals are added to the
        outputs once they are calibrated.
    """
    height, width = model.config.image_size
    # Tensors on the meta device have shapes and no numbers.
    ghost = copy.deepcopy(model).to("meta").eval()
    names = [spec.name for spec in model.task.inputs]
    with torch.inference_mode():
        pixels = torch.zeros((1, 3, height, width), device="meta")
        features = ghost.extract(pixels)
        pooled = ghost.pool(features)
        present = {name: torch.ones(1, dtype=torch.bool, device="meta") for name in names}
        logits = ghost.logits(dict.fromkeys(names, features), present)
    labels = _feature_names(model, len(features))
    vectors = [pooled] if isinstance(pooled, Tensor) else list(pooled)
    return {
        "inputs": {name: [1, 3, height, width] for name in names},
        "features": {n: list(x.shape) for n, x in zip(labels, features, strict=True)},
        "pooled": [list(x.shape) for x in vectors],
        "logits": list(logits.shape),
        "outputs": [
            {"name": spec.name, "unit": spec.unit, "shape": list(spec.shape), "dtype": spec.dtype}
            for spec in model.task.outputs(model.config)
        ],
    }


def count_parameters(model: TaskModel) -> dict[str, Any]:
    """Return numbers of parameters: {"whole", "trained", "parts": {part: {"whole", "trained"}}}."""
    parts = {
        name: {
            "whole": sum(p.numel() for p in part.parameters()),
            "trained": sum(p.numel() for p in part.parameters() if p.requires_grad),
        }
        for name, part in model.named_children()
    }
    # What has no parameter, as most pools and decoders have none, is not worth a line.
    parts = {name: counts for name, counts in parts.items() if counts["whole"]}
    return {
        "whole": sum(counts["whole"] for counts in parts.values()),
        "trained": sum(counts["trained"] for counts in parts.values()),
        "parts": parts,
    }


def _feature_names(model: TaskModel, count: int) -> list[str]:
    if isinstance(model.pool, TapPool):
        return [f"tap {tap}" for tap in model.pool.taps]
    return [model.config.features.kind] * count


def _steps(config: TrainConfig, samples: int) -> dict[str, int]:
    batches = math.ceil(samples / config.batch_size)
    steps = math.ceil(batches / config.accumulate)
    return {
        "batches_per_epoch": batches,
        "steps_per_epoch": steps,
        "epochs": config.epochs,
        "steps": steps * config.epochs,
    }


def _cache(
    config: TrainConfig, model: TaskModel, dataset: Dataset, shapes: dict[str, Any]
) -> dict[str, Any] | None:
    """Return what features take on disk; None where the backbone trains and none are kept."""
    if config.mode == "finetune":
        return None
    copies = config.augment_copies if config.augment else 0
    folder = config.cache or default_cache()
    store = FeatureStore(model, folder, copies, config.seed, config.cache_precision)
    entries = [
        store.entry(sample, name, number)
        for sample in dataset.samples
        for number in range(1 + (copies if sample.split == "train" else 0))
        for name in sample.images
    ]
    numbers = sum(math.prod(shape) for shape in shapes["features"].values())
    each = numbers * BYTES[config.cache_precision] + ENTRY_OVERHEAD_BYTES
    # Two samples may share a picture, and then its entry.
    unique = set(entries)
    there = sum(path.is_file() for path in unique)
    return {
        "folder": str(folder),
        "entries": len(unique),
        "bytes": len(unique) * each,
        "present": there,
        "new_bytes": (len(unique) - there) * each,
    }


def _writes(config: TrainConfig) -> list[dict[str, Any]]:
    wanted: list[tuple[Path, str]] = [(config.out, "the checkpoint")]
    if config.report:
        wanted.append((report_path(config.out), "a page about it"))
    if config.events is not None:
        wanted.append((config.events, "logs for TensorBoard"))
    wanted.append((state_path(config.out), "the run's state, removed at its end"))
    return [{"path": str(path), "what": what, "replaces": path.is_file()} for path, what in wanted]
