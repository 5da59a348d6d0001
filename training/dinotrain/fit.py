"""Training and evaluation of a model: data and backbone in, checkpoint out.

Here a run is set up from its recipe; ``loop`` runs its epochs, ``finish`` judges and writes the
best weights. Source: METHODS B7, C, D.
"""

import math
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.fsdp import FSDPStrategy
from lightning_fabric.strategies.strategy import Strategy

from dinotrain.backbones import load_backbone
from dinotrain.backbones.loading import Backbone
from dinotrain.checkpoint import CheckpointConfig, load_checkpoint
from dinotrain.data.dataset import Dataset
from dinotrain.data.judging import told_of_checks
from dinotrain.data.summary import skipped_lines, summary_lines
from dinotrain.errors import DataError, UsageError, unknown_name
from dinotrain.features import (
    FeatureStore,
    Progress,
    default_cache,
    silent,
    weights_digest,
)
from dinotrain.finish import round_to_half_, write_model
from dinotrain.heads.branch import HeadConfig
from dinotrain.heads.build import choose_features
from dinotrain.heads.pool import TAPS_READ, FeatureConfig, own_taps
from dinotrain.loop import Run, predict, prepare_backbone_, seed_for
from dinotrain.model import ModelConfig, TaskModel
from dinotrain.sources import Pictures, Source
from dinotrain.tasks import get_task
from dinotrain.tasks.base import Task
from dinotrain.train_config import TrainConfig
from dinotrain.training_state import state_path


def train(config: TrainConfig, progress: Progress | None = None) -> Path:
    """Train a head on frozen features, or with its backbone, and write a checkpoint.

    Args:
        config: what to do.
        progress: told of the stages "check", "features" and "training" as they go, and of what is
            in the data.

    Returns:
        The checkpoint's path. An earlier file there is replaced only once training is done.

    Raises:
        DinoError: anything that the user can mend; see each exception of the tree.
    """
    fabric = launch(config)
    report = (progress or silent) if fabric.is_global_zero else silent
    task = get_task(config.task)
    dataset = read_data(config, task, report)
    backbone = load_backbone(config.backbone, config.image_size)
    config = decide(config, backbone)
    model = build_model(config, backbone, dataset.classes).to(fabric.device)
    objective = task.objective(config, model)
    objective.check(dataset.split("train").labels(task.label_names(dataset.classes)))
    digest = weights_digest(model.backbone, model.config.backbone)
    source = open_source(config, model, dataset, fabric, report)
    identity = {"data": dataset.fingerprint, "backbone": digest}
    file = state_path(config.out)
    run = Run(config, model, dataset, source, objective, fabric, identity, file)
    run.train(report)
    model.load_state_dict(run.state.best, strict=False)
    journal = run.state.journal
    log = {
        "best_epoch": journal.best_epoch,
        "stopped": journal.stopped,
        "backbone_digest": digest,
        "log": {
            "epoch": [entry.epoch for entry in journal.log],
            "loss": [_short(entry.loss) for entry in journal.log],
            "val_error": [_short(entry.val_error) for entry in journal.log],
            **{
                name: [_short(entry.figures[name]) for entry in journal.log]
                for name in (journal.log[0].figures if journal.log else ())
            },
        },
    }
    if fabric.is_global_zero:
        write_model(config, model, dataset, source, objective, log)
        file.unlink(missing_ok=True)
    fabric.barrier()
    return config.out


def read_data(
    config: TrainConfig, task: Task, report: Progress = silent, *, tell: bool = True
) -> Dataset:
    """Read what a run trains on.

    Args:
        config: names the data.
        task: reads them.
        report: told of the stage "check".
        tell: whether ``report`` is told what is in the data, too.

    Raises:
        DataError: the data cannot be used.
    """
    dataset = task.read(
        config.data,
        image_size=config.image_size,
        seed=config.seed,
        skip_unreadable=config.skip_unreadable,
        progress=told_of_checks(report),
    )
    if tell:
        for line in summary_lines(task.summarise(dataset)):
            report("data", 0, 0, line)
    return dataset


def launch(config: TrainConfig) -> Fabric:
    """Start the processes that a run is shared among; each goes on from here.

    Raises:
        UsageError: the device or the strategy is not to be had.
    """
    fabric = make_fabric(config)
    fabric.launch()
    return fabric


def make_fabric(config: TrainConfig) -> Fabric:
    """Return what a run is shared by, not yet started.

    Raises:
        UsageError: the device or the strategy is not to be had.
    """
    device = pick_device(config.device)
    strategy: Strategy | str = "auto"
    if config.strategy == "fsdp":
        if device.type != "cuda":
            raise UsageError("strategy fsdp shards over GPUs, and there is none. Use ddp.")
        strategy = FSDPStrategy()
    elif config.devices > 1:
        # Of a backbone that trains not every weight is read: the mask token never is.
        strategy = DDPStrategy(find_unused_parameters=config.mode == "finetune")
    precision = {"off": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}[config.amp]
    if config.amp == "float16" and device.type != "cuda":
        raise UsageError("amp float16 needs a GPU. Use bfloat16, or off.")
    return Fabric(
        accelerator=device.type,
        devices=config.devices,
        strategy=strategy,
        precision=cast(Any, precision),
    )


def decide(config: TrainConfig, backbone: Backbone) -> TrainConfig:
    """Return a recipe whose head, features, taps and loss are all named.

    Raises:
        UsageError: they do not fit the task, the backbone, or each other.
    """
    task = get_task(config.task)
    head = config.head or HeadConfig(kind=task.heads[0])
    if head.kind not in task.heads:
        raise unknown_name(f"head of task {task.name}", head.kind, task.heads)
    features = choose_features(head.kind, config.features, backbone.config)
    if features.kind in TAPS_READ and not features.taps:
        taps = own_taps(backbone.config, features.kind)
        features = msgspec.structs.replace(features, taps=taps)
    loss = task.choose_loss(config)
    return msgspec.structs.replace(config, head=head, features=features, loss=loss)  # type: ignore[arg-type]


def open_source(
    config: TrainConfig, model: TaskModel, dataset: Dataset, fabric: Fabric, report: Progress
) -> Source:
    """Return what training reads: pictures, or their features, computed where they are missing."""
    if config.mode == "finetune":
        return Pictures(model.task, config.image_size, config.seed, config.augment)
    copies = config.augment_copies if config.augment else 0
    cache = config.cache or default_cache()
    store = FeatureStore(model, cache, copies, config.seed, config.cache_precision)
    # Each process computes its part, and reads the others' from the cache behind the barrier.
    shard = (fabric.global_rank, fabric.world_size)
    store.prepare(dataset, report, shard)
    fabric.barrier()
    return store


def evaluate(
    checkpoint: Path,
    data: Path,
    *,
    split: Literal["train", "val", "test", "all"] = "test",
    cache: Path | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    skip_unreadable: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Judge a checkpoint on labelled data.

    Args:
        checkpoint: a trained model.
        data: what the task's reader reads; blank splits are drawn with the seed of the training.
        split: which samples.
        cache: folder of cached features.
        device: where to compute.
        skip_unreadable: leave out pictures that cannot be read.
        progress: told of the stages "check" and "features".

    Returns:
        {split, samples, subjects, source, synthetic, dataset_fingerprint, seen_in_training,
        skipped: what was left out, targets: metrics of the task}. The baseline is what the training
        labels gave. ``seen_in_training`` is true where the data are those of the training and the
        split holds train or val subjects.

    Raises:
        DinoError: the checkpoint or the data cannot be used, or the split is empty.
    """
    model, config = load_checkpoint(checkpoint)
    model.to(pick_device(device))
    seed = config.training.get("seed", 0)
    report = progress or silent
    dataset = model.task.read(
        data,
        image_size=config.image_size,
        seed=seed,
        skip_unreadable=skip_unreadable,
        progress=told_of_checks(report),
    )
    for line in skipped_lines(dataset.skipped):
        report("data", 0, 0, line)
    splits = ("train", "val", "test") if split == "all" else (split,)
    chosen = dataset.split(*splits)
    if not chosen.samples:
        raise DataError(f"{data}: no sample is in the split '{split}'. Name another one, or 'all'.")
    store = FeatureStore(model, cache or default_cache())
    store.prepare(chosen, report)
    _check_classes(dataset, config, data)
    baseline = config.training.get("baseline", {})
    names = model.task.label_names(config.classes)
    reference = np.array([[baseline.get(name, math.nan) for name in names]])
    predicted = predict(model, store, chosen.samples)
    true = model.task.truth(chosen.samples, config.image_size)
    subjects = [sample.subject_id for sample in chosen.samples]
    targets = model.task.evaluate(predicted, true, reference, config.classes, subjects)
    return {
        "split": split,
        "samples": len(chosen.samples),
        "subjects": len({sample.subject_id for sample in chosen.samples}),
        "source": chosen.source,
        "synthetic": chosen.synthetic,
        "dataset_fingerprint": dataset.fingerprint,
        "seen_in_training": dataset.fingerprint == config.dataset_fingerprint and split != "test",
        "skipped": list(dataset.skipped),
        "targets": targets,
    }


def build_model(
    config: TrainConfig, backbone: Backbone, classes: tuple[str, ...] = ()
) -> TaskModel:
    """Return the model to train: its head drawn from the seed, its backbone as loaded.

    Args:
        config: the recipe, decided.
        backbone: frozen or set to train in place, and rounded in place where it is frozen and
            weights are stored in half precision.
        classes: names, where the task has classes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(config.seed, "head", 0))
        model = TaskModel(
            ModelConfig(
                task=config.task,
                backbone=backbone.config,
                image_size=config.image_size,
                features=config.features or FeatureConfig(),
                head=config.head or HeadConfig(),
                encoding=config.encoding,
                classes=classes,
            )
        )
    if config.weights == "float16" and config.mode == "frozen":
        # Rounded before features are taken, so that metrics are those of the stored weights.
        round_to_half_(backbone)
    model.backbone = backbone.eval()
    prepare_backbone_(config, model)
    return model


def _check_classes(dataset: Dataset, config: CheckpointConfig, data: Path) -> None:
    if dataset.classes != config.classes:
        raise DataError(
            f"{data}: its classes {', '.join(dataset.classes)} are not those of the checkpoint: "
            f"{', '.join(config.classes)}. Give data with the same classes in the same order."
        )


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def pick_device(name: str) -> torch.device:
    """Return the device of a name; ``auto`` takes CUDA where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device 'cuda' is not available here. Use --device cpu.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
