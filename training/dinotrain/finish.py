"""The end of a run: the best weights judged as they will be stored, written, and reported."""

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinotrain.backbones.loading import NAMES
from dinotrain.checkpoint import CheckpointConfig, read_config, save_checkpoint
from dinotrain.data.dataset import Dataset
from dinotrain.errors import CheckpointError
from dinotrain.loop import logits_of, predict
from dinotrain.model import ModelConfig, TaskModel
from dinotrain.objectives.base import Objective, Predictions, Values
from dinotrain.report.training import JudgedSplit, report_path, write_training_report
from dinotrain.sources import Source
from dinotrain.train_config import TrainConfig

SYNTHETIC_NOTICE = "Trained on synthetic images only: its figures say nothing about real ones."
SYNTHETIC_BACKBONE_NOTICE = "Its backbone was trained on synthetic images only."


def write_model(
    config: TrainConfig,
    model: TaskModel,
    dataset: Dataset,
    source: Source,
    objective: Objective,
    log: dict[str, Any],
) -> Path:
    """Write a trained model with its story and its metrics, taken with the weights as stored.

    Args:
        config: names the place, and the recipe that the header tells.
        model: its weights are final.
        dataset: all splits of what it was trained on.
        source: gives the samples of ``dataset``.
        objective: gives the baseline.
        log: how training went, for the header.

    Returns:
        The checkpoint's path.
    """
    live = config.mode == "finetune"
    if config.weights == "float16":
        # A frozen backbone was rounded before its features were taken.
        parts = [model.pool, model.head, model.placeholders, model.decoder]
        for part in [*parts, model.backbone] if live else parts:
            round_to_half_(part)
    unsure, told = add_intervals_(config, model, dataset, source)
    reference = dataset.split("train").labels(model.task.label_names(dataset.classes))
    judged = {
        name: _judge(model, source, part, reference, live, told if name == "val" else None)
        for name in ("val", "test")
        if (part := dataset.split(name)).samples  # type: ignore[arg-type]
    }
    origin_of_backbone, synthetic_backbone = _backbone_source(config)
    origin_of_backbone += ", fine-tuned on the same samples" if live else ""
    origin = SYNTHETIC_BACKBONE_NOTICE if synthetic_backbone else ""
    origin = SYNTHETIC_NOTICE if dataset.synthetic else origin
    plain = {name: getattr(model.config, name) for name in ModelConfig.__struct_fields__}
    header = CheckpointConfig(
        **plain,
        name=config.name or f"{config.task}-{model.config.backbone.name}-{config.image_size[0]}",
        window_mm=model.task.window_mm,
        orientation=model.task.orientation,
        trained_on=f"{_data_source(dataset)}; backbone: {origin_of_backbone}",
        notice=" ".join(filter(None, (origin, model.task.notice))),
        dataset_fingerprint=dataset.fingerprint,
        metrics={name: split.metrics for name, split in judged.items()},
        training=config.recipe()
        | {
            "baseline": objective.baseline(reference),
            "label_step": dataset.label_step(),
            "no_intervals": unsure,
            "bit_calibration_error": _judge_bits(model, dataset, source, objective, live),
            # The names of files and people stay out of what is passed on.
            "skipped": len(dataset.skipped),
        }
        | log,
        versions=_versions(),
    )
    dtype = torch.float16 if config.weights == "float16" else torch.float32
    save_checkpoint(model, header, config.out, dtype)
    if config.report:
        write_training_report(
            report_path(config.out),
            model,
            header,
            objective.error_name,
            judged,
            model.task.summarise(dataset),
        )
    return config.out


def add_intervals_(
    config: TrainConfig, model: TaskModel, dataset: Dataset, source: Source
) -> tuple[str, Predictions | None]:
    """Give a model intervals that hold on the validation samples, in place.

    Returns:
        Why there are none, or nothing; and what the model predicts of these samples, where that
        was worked out and has not changed since.
    """
    part = dataset.split("val")
    if not config.coverage or not part.samples:
        reason = "no validation samples to calibrate on" if config.coverage else "not asked for"
        return reason, None
    predicted = predict(model, source, part.samples, config.mode == "finetune")
    true = model.task.truth(part.samples, part.image_size)
    subjects = [sample.subject_id for sample in part.samples]
    intervals, reason = model.task.calibrate(predicted, true, subjects, config.coverage)
    if intervals is None:
        return reason, predicted
    model.set_intervals_(intervals)
    return "", None


def _judge(
    model: TaskModel,
    source: Source,
    part: Dataset,
    reference: Values,
    live: bool,
    predicted: Predictions | None,
) -> JudgedSplit:
    """Judge one split; predictions that are known are not worked out again."""
    if predicted is None:
        predicted = predict(model, source, part.samples, live)
    true = model.task.truth(part.samples, part.image_size)
    subjects = [sample.subject_id for sample in part.samples]
    metrics = model.task.evaluate(predicted, true, reference, part.classes, subjects)
    return JudgedSplit(part, predicted, true, metrics)


def _judge_bits(
    model: TaskModel, dataset: Dataset, source: Source, objective: Objective, live: bool
) -> dict[str, list[float | None]]:
    """Calibration error per bit on the test samples, {output name: …}; empty where none are bits.

    Source: METHODS B8.
    """
    part = dataset.split("test")
    if not objective.has_bits or not part.samples:
        return {}
    logits = torch.cat(list(logits_of(model, source, part.samples, live)))
    found = objective.bit_calibration(logits, model.task.truth(part.samples, part.image_size))
    return {
        name: [None if error is None else round(error, 4) for error in errors]
        for name, errors in found.items()
    }


def _data_source(dataset: Dataset) -> str:
    counts = ", ".join(
        f"{name} {len(dataset.split(name).samples)}"  # type: ignore[arg-type]
        for name in ("train", "val", "test")
    )
    subjects = len({sample.subject_id for sample in dataset.samples})
    return f"{dataset.source}, {len(dataset.samples)} samples of {subjects} subjects ({counts})"


def _backbone_source(config: TrainConfig) -> tuple[str, bool]:
    """Return what the backbone was trained on, in words, and whether that was synthetic."""
    path = Path(config.backbone)
    if path.is_file() and not config.backbone_note:
        try:
            header = read_config(path)
        except CheckpointError:
            return path.name, False
        # The head's data are not the backbone's: only what follows "backbone: " counts.
        origin = header.trained_on.rpartition("; backbone: ")[2] or header.backbone.name
        notices = (SYNTHETIC_NOTICE, SYNTHETIC_BACKBONE_NOTICE)
        return origin, any(notice in header.notice for notice in notices)
    name = config.backbone if config.backbone.partition("@")[0] in NAMES else path.name
    note = f"{name} ({config.backbone_note})" if config.backbone_note else name
    return note, "synthetic" in config.backbone_note


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("dinoexport", "torch", "numpy", "pillow"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def round_to_half_(module: nn.Module) -> None:
    """Round all numbers of a module to what half precision holds, in place."""
    with torch.no_grad():
        for value in [*module.parameters(), *module.buffers()]:
            value.copy_(value.half().to(value.dtype))
