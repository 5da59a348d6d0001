"""The epochs of one training run, in one process or in many; ``fit`` sets it up.

A run depends on its recipe, its data and its backbone only: each epoch draws from a seed of its
own, so that a resumed run gives the bits of an uninterrupted one on a CPU. Several processes share
each batch: every one takes its part through the model, the logits are gathered, and the loss is
that of the whole batch, so that losses that are no mean over samples (Dice) come out the same.
Source: METHODS B7, C.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from dinotrain.backbones.convnets.backbone import ConvNet
from dinotrain.backbones.layer_decay import parameter_groups
from dinotrain.data.dataset import Dataset, Sample
from dinotrain.errors import CheckpointError, UsageError
from dinotrain.features import Progress
from dinotrain.heads.pool import Features
from dinotrain.model import TaskModel
from dinotrain.objectives.base import Objective, Predictions
from dinotrain.pace import Pace
from dinotrain.report.event_log import EventLog
from dinotrain.schedule import rate_factor
from dinotrain.sources import Batch, Dropped, Source
from dinotrain.train_config import TrainConfig
from dinotrain.training_state import (
    EpochLog,
    Journal,
    Tensors,
    TrainingState,
    load_state,
    save_state,
)

EVALUATION_BATCH = 64
SHOWN = 10
"""Samples of a bad batch that are named."""


class Trainee(nn.Module):
    """What one step runs: from features, or with ``live`` from pictures, to logits."""

    def __init__(self, model: TaskModel, live: bool) -> None:
        super().__init__()
        self.model = model
        self.live = live

    def forward(self, inputs: dict[str, Features], present: dict[str, Tensor]) -> Tensor:
        """{input: features, or one (B, 3, H, W) of 0..255} → logits."""
        if self.live:
            inputs = {name: self.model.extract(value[0]) for name, value in inputs.items()}
        return self.model.logits(inputs, present)


@torch.inference_mode()
def predict(
    model: TaskModel, source: Source, samples: Sequence[Sample], live: bool = False
) -> Predictions:
    """Predict samples in this process alone.

    Returns:
        The named outputs, samples first: float64, or the output's own whole numbers.
    """
    return _stack([model.decode(logits) for logits in logits_of(model, source, samples, live)])


@torch.inference_mode()
def logits_of(
    model: TaskModel, source: Source, samples: Sequence[Sample], live: bool = False
) -> Iterator[Tensor]:
    """Give the logits of samples, some at a time, in this process alone."""
    trainee = Trainee(model, live)
    was_training = model.training
    model.eval()
    device = model.pixel_mean.device
    for start in range(0, len(samples), EVALUATION_BATCH):
        batch = source.batch(samples[start : start + EVALUATION_BATCH]).to(device)
        yield trainee(batch.inputs, batch.present)
    model.train(was_training)


def _stack(rows: list[dict[str, Tensor]]) -> Predictions:
    def plain(value: Tensor) -> np.ndarray:
        return (value.double() if value.is_floating_point() else value).cpu().numpy()

    names = rows[0] if rows else {}
    return {name: np.concatenate([plain(row[name]) for row in rows]) for name in names}


class Run:
    """One training run: owns the state and goes from epoch to epoch.

    Args:
        config: its head, features and loss are decided.
        model: on its device.
        dataset: with its training and validation samples.
        source: gives them.
        objective: bound to the model.
        fabric: launched.
        identity: what a resumed run must share beside the recipe.
        file: where the state is kept between epochs.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: TaskModel,
        dataset: Dataset,
        source: Source,
        objective: Objective,
        fabric: Fabric,
        identity: dict[str, Any],
        file: Path,
    ) -> None:
        self.config = config
        self.model = model
        self.source = source
        self.objective = objective
        self.fabric = fabric
        self.file = file
        self.live = config.mode == "finetune"
        self.samples = dataset.split("train").samples
        self.held = dataset.split("val").samples
        objective.start_(dataset.split("train").labels(model.task.label_names(dataset.classes)))
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        optimizer = build_optimizer(config, model)
        self.rates = [group["lr"] for group in optimizer.param_groups]
        identity = config.recipe() | identity
        if config.resume:
            self.state = load_state(file, identity)
            _restore(model, optimizer, self.state, file, self.live)
        else:
            weights = self._weights()
            self.state = TrainingState(
                journal=Journal(identity=identity), weights=weights, best=weights, moments={}
            )
        self.trainee, self.optimizer = fabric.setup(Trainee(model, self.live), optimizer)

    def train(self, report: Progress) -> None:
        """Run the epochs that are left; ``state.best`` are the weights to keep."""
        journal = self.state.journal
        log = self._open_log(journal.epoch + 1)
        while journal.epoch < self.config.epochs and not journal.stopped:
            epoch = journal.epoch + 1
            pace = Pace("samples")
            loss, fault = self._epoch(epoch)
            speed = pace.note(len(self.samples))
            if fault is not None:
                if not journal.best_epoch:
                    raise UsageError(
                        f"{fault.text}, and no epoch was finished. Lower the learning rate "
                        f"({self.config.lr:g}), or look at its samples: {fault.samples}"
                    )
                # The journal becomes a part of the checkpoint, which names nobody.
                journal.stopped = (
                    f"{fault.text}; the weights of epoch {journal.best_epoch} are kept"
                )
                report("training", journal.epoch, self.config.epochs, journal.stopped)
                report("training", 0, 0, f"samples of that batch: {fault.samples}")
                return
            self._close(epoch, loss)
            if self.fabric.is_global_zero:
                save_state(self.state, self.file)
            if log is not None:
                entry, rates = journal.log[-1], [g["lr"] for g in self.optimizer.param_groups]
                named = {"loss": entry.loss, f"val/{self.objective.error_name}": entry.val_error}
                log.scalars(epoch, {**named, **entry.figures, "learning rate": rates[0]})
            words = [_line(journal, self.objective.error_name), speed]
            report("training", epoch, self.config.epochs, ", ".join(filter(None, words)))

    def _open_log(self, first_epoch: int) -> EventLog | None:
        if self.config.events is None or not self.fabric.is_global_zero:
            return None
        return EventLog(self.config.events, first_epoch if self.config.resume else 0)

    def _epoch(self, epoch: int) -> "tuple[float, _Fault | None]":
        """Train one epoch; returns the mean loss, and what went wrong if anything did."""
        config, order, hidden = self.config, *self._draw(epoch)
        starts = range(0, len(order), config.batch_size)
        total = 0.0
        self.trainee.train()
        if not self.live:
            self.model.backbone.eval()
        self.optimizer.zero_grad(set_to_none=True)
        device = self.fabric.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed_for(config.seed, "dropout", epoch, self.fabric.global_rank))
            for batch, start in enumerate(starts, start=1):
                chosen = order[start : start + config.batch_size]
                last = batch % config.accumulate == 0 or batch == len(starts)
                self._set_rates(epoch - 1 + (batch - 1) / len(starts))
                with self.fabric.no_backward_sync(self.trainee, enabled=not last):
                    loss = self._loss(chosen, hidden, epoch)
                    if not bool(loss.isfinite()):
                        text = f"the loss is {loss.item()} in epoch {epoch}, batch {batch}"
                        return total, self._blame(text, order, batch)
                    self.fabric.backward(loss / config.accumulate)
                if last:
                    self._step()
                total += loss.item() * len(chosen)
        if not self._is_finite():
            text = f"weights are not finite after epoch {epoch}, batch {len(starts)}"
            return total, _Fault(text, self._names(order, len(starts)))
        return total / len(order), None

    def _is_finite(self) -> bool:
        return all(bool(value.isfinite().all()) for value in self.parameters.values())

    def _blame(self, text: str, order: list[int], batch: int) -> "_Fault":
        """Name the samples that a loss which is not finite comes from: its own, or the last step's.

        Args:
            text: what happened.
            order: of the epoch's samples.
            batch: from 1.
        """
        before = (batch - 1) // self.config.accumulate * self.config.accumulate
        if self._is_finite() or not before:
            return _Fault(text, self._names(order, batch))
        # A gradient ruined the weights: its samples are what to look at.
        text += f", because the step of batch {before} left weights that are not finite"
        return _Fault(text, self._names(order, before))

    def _names(self, order: list[int], batch: int) -> str:
        """Name the samples of a batch (from 1), the first ten of them."""
        size = self.config.batch_size
        chosen = [self.samples[i].name for i in order[(batch - 1) * size : batch * size]]
        more = f" and {len(chosen) - SHOWN} more" if len(chosen) > SHOWN else ""
        return ", ".join(chosen[:SHOWN]) + more

    def _step(self) -> None:
        if self.config.clip_norm:
            self.fabric.clip_gradients(
                self.trainee,
                self.optimizer,
                max_norm=self.config.clip_norm,
                error_if_nonfinite=False,
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _draw(self, epoch: int) -> tuple[list[int], dict[str, Tensor]]:
        """Order of the samples, and which inputs are withheld: {input: (samples,) bool}."""
        generator = torch.Generator().manual_seed(seed_for(self.config.seed, "order", epoch))
        order = torch.randperm(len(self.samples), generator=generator).tolist()
        hidden = {
            spec.name: torch.rand(len(self.samples), generator=generator) < self.config.input_drop
            for spec in self.model.task.inputs
            if spec.optional
        }
        return order, hidden

    def _loss(self, chosen: list[int], hidden: dict[str, Tensor], epoch: int) -> Tensor:
        share = self._share(chosen)
        logits, truth = self._forward(
            [self.samples[index] for index in share],
            len(chosen),
            lambda place, name: bool(hidden[name][share[place]]),
            epoch,
        )
        return self.objective.loss(logits.float(), truth)

    def _forward(
        self,
        samples: Sequence[Sample],
        count: int,
        dropped: Dropped | None = None,
        epoch: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits and truth of a whole batch of ``count``, of which this process reads a share."""
        batch: Batch = self.source.batch(samples, dropped, epoch).to(self.fabric.device)
        logits = self.trainee(batch.inputs, batch.present)
        if self.fabric.world_size == 1:
            return logits, batch.truth
        # Gradients flow back into each process's share, summed over the processes; DDP's mean
        # over processes then gives the gradient of the one loss that all of them computed.
        logits = self.fabric.all_gather(logits, sync_grads=True).flatten(0, 1)[:count]  # type: ignore[union-attr]
        truth = self.fabric.all_gather(batch.truth).flatten(0, 1)[:count]  # type: ignore[union-attr]
        return logits, truth

    def _share(self, chosen: Sequence[Any]) -> list[Any]:
        """Return this process's part of a batch; shares have one length, the last is filled up."""
        world = self.fabric.world_size
        length = -(-len(chosen) // world)
        padded = [*chosen, *[chosen[-1]] * (length * world - len(chosen))]
        first = self.fabric.global_rank * length
        return padded[first : first + length]

    def _close(self, epoch: int, loss: float) -> None:
        """Validate, and keep the weights if they are the best so far."""
        journal, state = self.state.journal, self.state
        error = self._validate()
        state.weights = self._weights()
        state.moments = _moments(self.optimizer)
        # Without validation labels the last weights are as good as can be told.
        best = journal.best_error
        if error is None or best is None or error < best - self.config.min_delta:
            state.best, journal.best_epoch, journal.best_error = state.weights, epoch, error
        journal.epoch = epoch
        entry = EpochLog(epoch=epoch, loss=loss, val_error=error, figures=self._diagnose())
        journal.log = [*journal.log, entry]
        if epoch - journal.best_epoch >= self.config.patience and epoch < self.config.epochs:
            journal.stopped = f"no better validation error since epoch {journal.best_epoch}"

    def _diagnose(self) -> dict[str, float]:
        """Return the objective's figures on the first training samples, the same ones each epoch.

        Gradients are taken at what the backbone gives, and reach no weight. Every process computes
        the same; shards of weights cannot be read one by one, so that FSDP goes without.
        """
        if not self.objective.diagnoses or self.config.strategy == "fsdp":
            return {}
        self.model.eval()
        batch = self.source.batch(self.samples[:EVALUATION_BATCH]).to(self.fabric.device)
        features: dict[str, Features] = {}
        for name, value in batch.inputs.items():
            with torch.no_grad():
                taken = self.model.extract(value[0]) if self.live else value
            features[name] = tuple(part.detach().requires_grad_() for part in taken)
        logits = self.model.logits(features, batch.present)
        parts = [part for value in features.values() for part in value]
        return self.objective.diagnose(logits.float(), batch.truth, parts)

    @torch.no_grad()
    def _validate(self) -> float | None:
        """Return the objective's figure on the validation samples, or None without labels."""
        if not self.held:
            return None
        self.trainee.eval()
        rows, truths = [], []
        for start in range(0, len(self.held), EVALUATION_BATCH):
            samples = self.held[start : start + EVALUATION_BATCH]
            logits, truth = self._forward(self._share(samples), len(samples))
            rows.append(self.model.decode(logits))
            truths.append(truth.cpu().numpy())
        return self.objective.validation_error(_stack(rows), np.concatenate(truths))

    def _set_rates(self, epochs_done: float) -> None:
        factor = rate_factor(self.config, epochs_done)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def _weights(self) -> Tensors:
        """Copy all that training may change; the backbone only where it trains."""
        return {
            name: value.detach().cpu().clone()
            for name, value in self.model.state_dict().items()
            if self.live or not name.startswith("backbone.")
        }


class _Fault(NamedTuple):
    """Why an epoch ended: what happened, and the samples that it happened with."""

    text: str
    samples: str


def build_optimizer(config: TrainConfig, model: TaskModel) -> torch.optim.Optimizer:
    """Return the optimizer over all that trains: the head at ``lr``, the backbone by its layers."""
    head = [
        value
        for name, value in model.named_parameters()
        if value.requires_grad and not name.startswith("backbone.")
    ]
    groups: list[Any] = [{"params": head, "lr": config.lr, "weight_decay": config.weight_decay}]
    if config.mode == "finetune":
        groups += parameter_groups(
            model.backbone,  # type: ignore[arg-type]
            lr=config.backbone_lr,
            layer_decay=config.layer_decay,
            weight_decay=config.weight_decay,
        )
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9)
    return (torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam)(groups)


def prepare_backbone_(config: TrainConfig, model: TaskModel) -> None:
    """Freeze the backbone, or let it train, in place."""
    live = config.mode == "finetune"
    model.backbone.requires_grad_(live)
    if isinstance(model.backbone, ConvNet):
        model.backbone.set_live_statistics_(live and config.live_statistics)


def seed_for(seed: int, purpose: str, epoch: int, rank: int = 0) -> int:
    """Return an independent 63-bit seed per purpose, epoch and process."""
    words = f"{seed}|{purpose}|{epoch}" + (f"|{rank}" if rank else "")
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") >> 1


def _restore(
    model: TaskModel,
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
    file: Path,
    live: bool,
) -> None:
    try:
        lost = model.load_state_dict(state.weights, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{file}: does not fit its own recipe: {error}") from error
    missing = [key for key in lost.missing_keys if live or not key.startswith("backbone.")]
    if lost.unexpected_keys or missing:
        raise CheckpointError(f"{file}: the saved training is damaged. Train again.")
    # A fresh state_dict supplies the options; only the moments come from the file.
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state.moments})


def _moments(optimizer: Any) -> dict[int, Tensors]:
    state = optimizer.state_dict()["state"]
    return {
        index: {name: value.detach().cpu().clone() for name, value in moments.items()}
        for index, moments in state.items()
    }


def _line(journal: Journal, name: str) -> str:
    entry = journal.log[-1]
    words = [f"loss {entry.loss:.4f}"]
    if entry.val_error is not None and not math.isnan(entry.val_error):
        words.append(f"val {name} {entry.val_error:.3f} (best {journal.best_error:.3f})")
    words += [f"{name.replace('_', ' ')} {value:.3f}" for name, value in entry.figures.items()]
    return ", ".join([*words, journal.stopped] if journal.stopped else words)
