"""Training and evaluation of a head on frozen features: data and backbone in, checkpoint out.

A run depends on its recipe, its data and its backbone only: each epoch draws from a seed of its
own, so that a resumed run gives the bits of an uninterrupted one on a CPU. Source: METHODS B7.
"""

import hashlib
import math
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinotrain.backbones import load_backbone
from dinotrain.backbones.vit import VARIANTS, VisionTransformer, default_taps
from dinotrain.checkpoint import CheckpointConfig, load_checkpoint, read_config, save_checkpoint
from dinotrain.data.dataset import Dataset, Sample
from dinotrain.errors import CheckpointError, DataError, UsageError
from dinotrain.features import FeatureStore, Progress, default_cache, silent
from dinotrain.model import ModelConfig, TaskModel
from dinotrain.objectives.base import Objective
from dinotrain.tasks import get_task
from dinotrain.train_config import TrainConfig
from dinotrain.training_state import (
    EpochLog,
    Journal,
    Tensors,
    TrainingState,
    load_state,
    save_state,
    state_path,
)

EVALUATION_BATCH = 64
SYNTHETIC_NOTICE = "Trained on synthetic images only: its figures say nothing about people."
SYNTHETIC_BACKBONE_NOTICE = "Its backbone was trained on synthetic images only."

Values = NDArray[np.float64]


def train(config: TrainConfig, progress: Progress | None = None) -> Path:
    """Train a head on frozen features and write a checkpoint.

    Args:
        config: what to do.
        progress: told of the stages "features" and "training" as they go.

    Returns:
        The checkpoint's path. An earlier file there is replaced only once training is done.

    Raises:
        DinoError: anything that the user can mend; see each exception of the tree.
    """
    report = progress or silent
    task = get_task(config.task)
    device = pick_device(config.device)
    config = msgspec.structs.replace(config, loss=task.choose_loss(config))  # type: ignore[arg-type]
    dataset = task.read(config.data, image_size=config.image_size, seed=config.seed)
    backbone = load_backbone(config.backbone, config.image_size)
    model = build_model(config, backbone, dataset.classes).to(device)
    objective = task.objective(config, model)
    objective.check(dataset.split("train").labels(task.labels))
    store = FeatureStore(model, config.cache or default_cache())
    store.prepare(dataset, report)
    run = _Run(config, model, dataset, store, objective)
    run.train(report)
    model.load_state_dict(run.state.best, strict=False)
    journal = run.state.journal
    log = {
        "best_epoch": journal.best_epoch,
        "stopped": journal.stopped,
        "log": {
            "epoch": [entry.epoch for entry in journal.log],
            "loss": [_short(entry.loss) for entry in journal.log],
            "val_error": [_short(entry.val_error) for entry in journal.log],
        },
    }
    path = write_model(config, model, dataset, store, objective, log)
    state_path(config.out).unlink(missing_ok=True)
    return path


def evaluate(
    checkpoint: Path,
    data: Path,
    *,
    split: Literal["train", "val", "test", "all"] = "test",
    cache: Path | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Judge a checkpoint on labelled data.

    Args:
        checkpoint: a trained model.
        data: what the task's reader reads; blank splits are drawn with the seed of the training.
        split: which samples.
        cache: folder of cached features.
        device: where to compute.
        progress: told of the stage "features".

    Returns:
        {split, samples, subjects, source, synthetic, dataset_fingerprint, seen_in_training,
        targets: metrics of the task}. The baseline is what the training labels gave.
        ``seen_in_training`` is true where the data are those of the training and the split holds
        train or val subjects.

    Raises:
        DinoError: the checkpoint or the data cannot be used, or the split is empty.
    """
    model, config = load_checkpoint(checkpoint)
    model.to(pick_device(device))
    seed = config.training.get("seed", 0)
    dataset = model.task.read(data, image_size=config.image_size, seed=seed)
    names = ("train", "val", "test") if split == "all" else (split,)
    chosen = dataset.split(*names)
    if not chosen.samples:
        raise DataError(f"{data}: no sample is in the split '{split}'. Name another one, or 'all'.")
    store = FeatureStore(model, cache or default_cache())
    store.prepare(chosen, progress or silent)
    _check_classes(dataset, config, data)
    baseline = config.training.get("baseline", {})
    reference = np.array([[baseline.get(name, math.nan) for name in model.task.labels]])
    predicted = predict(model, store, chosen.samples)
    return {
        "split": split,
        "samples": len(chosen.samples),
        "subjects": len({sample.subject_id for sample in chosen.samples}),
        "source": chosen.source,
        "synthetic": chosen.synthetic,
        "dataset_fingerprint": dataset.fingerprint,
        "seen_in_training": dataset.fingerprint == config.dataset_fingerprint and split != "test",
        "targets": model.task.evaluate(
            predicted, chosen.labels(model.task.labels), reference, config.classes
        ),
    }


@torch.inference_mode()
def predict(model: TaskModel, store: FeatureStore, samples: tuple[Sample, ...]) -> Values:
    """Predict samples.

    Returns:
        (samples, …), float64, in the form that the task collects.
    """
    was_training = model.training
    model.eval()
    device = model.pixel_mean.device
    rows = []
    for start in range(0, len(samples), EVALUATION_BATCH):
        features, present = store.batch(samples[start : start + EVALUATION_BATCH])
        outputs = model.decode(model.logits(_to(features, device), _to(present, device)))
        rows.append(model.task.collect(outputs).double().cpu().numpy())
    model.train(was_training)
    return np.concatenate(rows) if rows else np.zeros((0, len(model.task.labels)))


class _Run:
    """One training run: owns the state and goes from epoch to epoch."""

    def __init__(
        self,
        config: TrainConfig,
        model: TaskModel,
        dataset: Dataset,
        store: FeatureStore,
        objective: Objective,
    ) -> None:
        self.config = config
        self.model = model
        self.dataset = dataset
        self.store = store
        self.device = model.pixel_mean.device
        self.samples = dataset.split("train").samples
        self.held = dataset.split("val")
        self.objective = objective
        self.labels = dataset.split("train").labels(model.task.labels)
        self.file = state_path(config.out)
        objective.start_(self.labels)
        self.parameters = _trained(model)
        self.optimizer = _optimizer(config, self.parameters)
        identity = config.recipe() | {
            "data": dataset.fingerprint,
            "backbone": store.backbone_digest,
        }
        if config.resume:
            self.state = load_state(self.file, identity)
            self._restore()
        else:
            weights = self._weights()
            self.state = TrainingState(
                journal=Journal(identity=identity), weights=weights, best=weights, moments={}
            )

    def train(self, report: Progress) -> None:
        """Run the epochs that are left; ``state.best`` are the weights to keep."""
        journal = self.state.journal
        while journal.epoch < self.config.epochs and not journal.stopped:
            epoch = journal.epoch + 1
            loss, problem = self._epoch(epoch)
            if problem:
                if not journal.best_epoch:
                    raise UsageError(
                        f"{problem}, and no epoch was finished. Lower the learning rate "
                        f"({self.config.lr:g})."
                    )
                journal.stopped = f"{problem}; the weights of epoch {journal.best_epoch} are kept"
                report("training", journal.epoch, self.config.epochs, journal.stopped)
                return
            self._close(epoch, loss)
            save_state(self.state, self.file)
            report("training", epoch, self.config.epochs, _line(journal, self.objective.error_name))

    def _epoch(self, epoch: int) -> tuple[float, str]:
        """Train one epoch; returns the mean loss, and what went wrong or nothing."""
        config, order, hidden = self.config, *self._draw(epoch)
        starts = range(0, len(order), config.batch_size)
        total = 0.0
        self.model.train()
        with torch.random.fork_rng(devices=_forked(self.device)):
            torch.manual_seed(_seed(config.seed, "dropout", epoch))
            for batch, start in enumerate(starts, start=1):
                chosen = order[start : start + config.batch_size]
                step = (epoch - 1) * len(starts) + batch - 1
                self._set_lr(step, config.epochs * len(starts))
                loss = self._loss(chosen, hidden)
                if not bool(loss.isfinite()):
                    return total, f"the loss is {loss.item()} in epoch {epoch}, batch {batch}"
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
                total += loss.item() * len(chosen)
        if not all(bool(value.isfinite().all()) for value in self.parameters.values()):
            return total, f"weights are not finite after epoch {epoch}, batch {len(starts)}"
        return total / len(order), ""

    def _draw(self, epoch: int) -> tuple[list[int], dict[str, Tensor]]:
        """Order of the samples, and which inputs are withheld: {input: (samples,) bool}."""
        generator = torch.Generator().manual_seed(_seed(self.config.seed, "order", epoch))
        order = torch.randperm(len(self.samples), generator=generator).tolist()
        hidden = {
            spec.name: torch.rand(len(self.samples), generator=generator) < self.config.input_drop
            for spec in self.model.task.inputs
            if spec.optional
        }
        return order, hidden

    def _loss(self, chosen: list[int], hidden: dict[str, Tensor]) -> Tensor:
        features, present = self.store.batch(
            [self.samples[index] for index in chosen],
            lambda place, name: bool(hidden[name][chosen[place]]),
        )
        logits = self.model.logits(_to(features, self.device), _to(present, self.device))
        labels = torch.from_numpy(self.labels[chosen]).to(self.device)
        return self.objective.loss(logits, labels)

    def _close(self, epoch: int, loss: float) -> None:
        """Validate, and keep the weights if they are the best so far."""
        journal, state = self.state.journal, self.state
        error = self._validate()
        state.weights = self._weights()
        state.moments = _moments(self.optimizer)
        # Without validation labels the last weights are as good as can be told.
        if error is None or journal.best_error is None or error < journal.best_error:
            state.best, journal.best_epoch, journal.best_error = state.weights, epoch, error
        journal.epoch = epoch
        journal.log = [*journal.log, EpochLog(epoch=epoch, loss=loss, val_error=error)]
        if epoch - journal.best_epoch >= self.config.patience and epoch < self.config.epochs:
            journal.stopped = f"no better validation error since epoch {journal.best_epoch}"

    def _validate(self) -> float | None:
        """Return the objective's figure on the validation samples, or None without labels."""
        if not self.held.samples:
            return None
        true = self.held.labels(self.model.task.labels)
        predicted = predict(self.model, self.store, self.held.samples)
        return self.objective.validation_error(predicted, true)

    def _set_lr(self, step: int, steps: int) -> None:
        factor = 1.0
        if self.config.schedule == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * step / steps))
        if self.config.schedule == "step" and step >= steps / 2:
            factor = 0.1
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * factor

    def _weights(self) -> Tensors:
        """Copy all that the checkpoint holds beside the backbone."""
        return {
            name: value.detach().cpu().clone()
            for name, value in self.model.state_dict().items()
            if not name.startswith("backbone.")
        }

    def _restore(self) -> None:
        try:
            lost = self.model.load_state_dict(self.state.weights, strict=False)
        except RuntimeError as error:
            raise CheckpointError(f"{self.file}: does not fit its own recipe: {error}") from error
        if lost.unexpected_keys or any(not k.startswith("backbone.") for k in lost.missing_keys):
            raise CheckpointError(f"{self.file}: the saved training is damaged. Train again.")
        # A fresh state_dict supplies the options; only the moments come from the file.
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": self.state.moments})


def build_model(
    config: TrainConfig, backbone: VisionTransformer, classes: tuple[str, ...] = ()
) -> TaskModel:
    """Return the model to train: its head drawn from the seed, its backbone as loaded.

    Args:
        config: the recipe.
        backbone: frozen in place, and rounded in place where weights are stored in half precision.
        classes: names, where the task has classes.
    """
    features = config.features
    if features.kind == "pyramid" and not features.taps:
        taps = default_taps(backbone.config.depth)
        features = msgspec.structs.replace(features, taps=taps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(config.seed, "head", 0))
        model = TaskModel(
            ModelConfig(
                task=config.task,
                backbone=backbone.config,
                image_size=config.image_size,
                features=features,
                head=config.head,
                encoding=config.encoding,
                classes=classes,
            )
        )
    if config.weights == "float16":
        # Rounded before features are taken, so that metrics are those of the stored weights.
        _round_to_half_(backbone)
    model.backbone = backbone.requires_grad_(False).eval()
    return model


def _round_to_half_(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for value in [*module.parameters(), *module.buffers()]:
            value.copy_(value.half().to(value.dtype))


def _trained(model: TaskModel) -> Tensors:
    return {name: p for name, p in model.named_parameters() if not name.startswith("backbone.")}


def _optimizer(config: TrainConfig, parameters: Tensors) -> torch.optim.Optimizer:
    values = list(parameters.values())
    if config.optimizer == "sgd":
        return torch.optim.SGD(values, lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)
    adam = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return adam(values, lr=config.lr, weight_decay=config.weight_decay)


def _moments(optimizer: torch.optim.Optimizer) -> dict[int, Tensors]:
    state = optimizer.state_dict()["state"]
    return {
        index: {name: value.detach().cpu().clone() for name, value in moments.items()}
        for index, moments in state.items()
    }


def write_model(
    config: TrainConfig,
    model: TaskModel,
    dataset: Dataset,
    store: FeatureStore,
    objective: Objective,
    log: dict[str, Any],
) -> Path:
    """Write a trained model with its story and its metrics, taken with the weights as stored.

    Args:
        config: names the place, and the recipe that the header tells.
        model: its weights are final.
        dataset: all splits of what it was trained on.
        store: gives the features of ``dataset``.
        objective: gives the baseline.
        log: how training went, for the header.

    Returns:
        The checkpoint's path.
    """
    if config.weights == "float16":
        for part in (model.pool, model.head, model.placeholders, model.decoder):
            _round_to_half_(part)
    labels = model.task.labels
    reference = dataset.split("train").labels(labels)
    metrics = {}
    for name in ("val", "test"):
        part = dataset.split(name)  # type: ignore[arg-type]
        if part.samples:
            predicted = predict(model, store, part.samples)
            true = part.labels(labels)
            metrics[name] = model.task.evaluate(predicted, true, reference, dataset.classes)
    source, synthetic_backbone = _backbone_source(config)
    origin = SYNTHETIC_BACKBONE_NOTICE if synthetic_backbone else ""
    origin = SYNTHETIC_NOTICE if dataset.synthetic else origin
    plain = {name: getattr(model.config, name) for name in ModelConfig.__struct_fields__}
    header = CheckpointConfig(
        **plain,
        name=config.name or f"{config.task}-{model.config.backbone.name}-{config.image_size[0]}",
        window_mm=model.task.window_mm,
        orientation=model.task.orientation,
        trained_on=f"{_data_source(dataset)}; backbone: {source}",
        notice=" ".join(filter(None, (origin, model.task.notice))),
        dataset_fingerprint=dataset.fingerprint,
        metrics=metrics,
        training=config.recipe()
        | {
            "baseline": objective.baseline(reference),
            "label_step": dataset.label_step(),
            "backbone_digest": store.backbone_digest,
        }
        | log,
        versions=_versions(),
    )
    return save_checkpoint(model, header, config.out, _dtype(config))


def _check_classes(dataset: Dataset, config: CheckpointConfig, data: Path) -> None:
    if dataset.classes != config.classes:
        raise DataError(
            f"{data}: its classes {', '.join(dataset.classes)} are not those of the checkpoint: "
            f"{', '.join(config.classes)}. Give data with the same classes in the same order."
        )


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
    name = config.backbone if config.backbone.partition("@")[0] in VARIANTS else path.name
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


def _line(journal: Journal, name: str) -> str:
    entry = journal.log[-1]
    words = [f"loss {entry.loss:.4f}"]
    if entry.val_error is not None:
        words.append(f"val {name} {entry.val_error:.3f} (best {journal.best_error:.3f})")
    return ", ".join([*words, journal.stopped] if journal.stopped else words)


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _dtype(config: TrainConfig) -> torch.dtype:
    return torch.float16 if config.weights == "float16" else torch.float32


def pick_device(name: str) -> torch.device:
    """Return the device of a name; ``auto`` takes CUDA where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device 'cuda' is not available here. Use --device cpu.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _forked(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def _to(tensors: Tensors, device: torch.device) -> Tensors:
    return {name: value.to(device) for name, value in tensors.items()}


def _seed(seed: int, purpose: str, epoch: int) -> int:
    """Return an independent 63-bit seed per purpose and epoch."""
    digest = hashlib.sha256(f"{seed}|{purpose}|{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
