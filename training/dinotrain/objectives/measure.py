"""Measured quantities: losses on their codes, validated by their mean absolute error.

Source: METHODS B5, B7.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dinotrain.encoding import CODE_MATRIX_KINDS, Z_SCORE_KINDS, encode
from dinotrain.errors import DataError, UsageError
from dinotrain.losses.bits import bit_weights, focal
from dinotrain.losses.orthogonality import gradient_overlap, soft_orthogonality, task_orthogonality
from dinotrain.losses.regression import focal_r, gaussian_nll, mse
from dinotrain.metrics.uncertainty import bit_calibration_error
from dinotrain.objectives.base import Objective, Predictions, Values

if TYPE_CHECKING:
    from dinotrain.decoders import MeasureDecoder
    from dinotrain.heads.branch import BranchHead
    from dinotrain.heads.query import QueryHead
    from dinotrain.train_config import TrainConfig

MIN_LABELS = 2

BIT_LOSSES = ("bce", "focal")
LOSSES = {"scalar": ("mse", "focal_r"), "gaussian": ("nll",)}
"""Of z-scores, the first is the default; all codes take ``BIT_LOSSES``."""


def choose_loss(config: "TrainConfig") -> str:
    """Return the loss that is named, or the encoding's own: bce of codes, mse of scalars, nll.

    Raises:
        UsageError: the named loss, or weights per bit, do not fit the encoding.
    """
    kind = config.encoding.kind
    accepted = LOSSES.get(kind, BIT_LOSSES)
    loss = config.loss or accepted[0]
    if loss not in accepted:
        raise UsageError(
            f"loss '{loss}' does not fit encoding '{kind}' of task {config.task}; "
            f"accepted: {', '.join(accepted)}"
        )
    if config.bit_rho != 1 and kind in (*CODE_MATRIX_KINDS, *Z_SCORE_KINDS):
        raise UsageError(
            f"bit_rho {config.bit_rho} weighs the bits of plain and gray codes, and encoding "
            f"'{kind}' has none that are finer than others. Leave it at 1."
        )
    return loss


class MeasureObjective(Objective):
    """Codes or z-scores of targets, missing labels masked.

    Args:
        config: the loss and its settings.
        head: what is trained, on its device.
        decoder: of the same model.

    Raises:
        UsageError: the orthogonality is one of hidden layers, and the head has none.
    """

    error_name = "MAE"

    def __init__(
        self,
        config: "TrainConfig",
        head: "BranchHead | QueryHead",
        decoder: "MeasureDecoder",
    ) -> None:
        self.config = config
        self.head = head
        self.decoder = decoder
        self.targets = decoder.targets
        self.has_bits = config.encoding.kind not in Z_SCORE_KINDS
        self.diagnoses = config.orthogonality == "grad"
        weights = bit_weights(config.encoding.width, config.bit_rho)
        self.bit_weights = weights.to(decoder.low.device)
        if config.orthogonality == "so" and not head.hidden_weights():
            raise UsageError(
                "orthogonality 'so' is of hidden layers, and this head has none. Use task or "
                "none, or another head."
            )

    def check(self, labels: Values) -> None:
        """Ask for two labels per target."""
        counts = (~np.isnan(labels)).sum(axis=0)
        for target, count in zip(self.targets, counts, strict=True):
            if count < MIN_LABELS:
                raise DataError(
                    f"{target.output_name} has {count} labels among the training samples, at least "
                    f"{MIN_LABELS} are needed: its output would mean nothing. Label more samples."
                )

    def start_(self, labels: Values) -> None:
        """Set mean and standard deviation of z-scores, or how often each bit is set."""
        if self.config.encoding.kind in Z_SCORE_KINDS:
            self._start_scale_(labels)
        else:
            self._start_bias_(labels)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of the codes, with the orthogonality that is trained on."""
        loss = self._code_loss(logits, labels)
        if self.config.or_lambda and self.config.orthogonality in ("task", "so"):
            loss = loss + self.config.or_lambda * self._orthogonality()
        return loss

    def diagnose(
        self, logits: Tensor, labels: Tensor, embeddings: Sequence[Tensor]
    ) -> dict[str, float]:
        """Tell how far the targets pull the same way, where the orthogonality is ``grad``.

        Args:
            logits: (B, members, targets, width), computed from ``embeddings``; the graph is kept.
            labels: (B, targets) float64, NaN where a label is missing.
            embeddings: what the head read, such as (B, F) per picture; each requires a gradient.

        Returns:
            {"gradient_overlap": 0 to 1}, or nothing for the other kinds.
        """
        if not self.diagnoses:
            return {}
        columns = [slice(index, index + 1) for index in range(len(self.targets))]
        losses = [self._code_loss(logits, labels, column) for column in columns]
        return {"gradient_overlap": float(gradient_overlap(losses, embeddings))}

    def bit_calibration(self, logits: Tensor, labels: Values) -> dict[str, list[float | None]]:
        """Judge the probability of each bit; members are averaged.

        Args:
            logits: (n, members, targets, width).
            labels: (n, targets), NaN where a label is missing.

        Returns:
            {output name: expected calibration error per bit, None where no label is}, the order of
            ``encode``; nothing for z-scores, which have no bits.
        """
        if self.config.encoding.kind in Z_SCORE_KINDS:
            return {}
        decoder, values = self.decoder, torch.from_numpy(labels).to(logits.device)
        bits = encode(values, decoder.low, decoder.span, self.config.encoding)
        bits[values.isnan()] = torch.nan
        p = logits.float().sigmoid().mean(dim=1)
        found = {}
        for index, target in enumerate(self.targets):
            errors = bit_calibration_error(p[:, index].cpu().numpy(), bits[:, index].cpu().numpy())
            found[target.output_name] = [None if np.isnan(e) else float(e) for e in errors]
        return found

    def validation_error(self, predicted: Predictions, true: Values) -> float | None:
        """Mean over targets of the mean absolute error, in the targets' unit."""
        values = np.stack([predicted[target.output_name] for target in self.targets], axis=1)
        error = np.abs(values - true)
        per_target = [column[~np.isnan(column)] for column in error.T]
        means = [float(column.mean()) for column in per_target if len(column)]
        return sum(means) / len(means) if means else None

    def baseline(self, labels: Values) -> dict[str, float]:
        """Means of the labels."""
        means = np.nanmean(labels, axis=0).tolist()
        return {target.name: mean for target, mean in zip(self.targets, means, strict=True)}

    def _code_loss(self, logits: Tensor, labels: Tensor, targets: slice = slice(None)) -> Tensor:
        """Loss of some targets, all of them by default, without any orthogonality."""
        config, decoder = self.config, self.decoder
        logits, labels = logits[:, :, targets], labels[:, targets]
        mask = ~labels.isnan()
        if config.encoding.kind not in Z_SCORE_KINDS:
            low, span = decoder.low[targets], decoder.span[targets]
            bits = encode(labels, low, span, config.encoding)
            gamma = config.gamma if config.loss == "focal" else 0.0
            return focal(logits, bits, mask, gamma, self.bit_weights)
        values, mean, std = labels.float(), decoder.mean[targets], decoder.std[targets]
        if config.loss == "nll":
            return gaussian_nll(logits, values, mask, mean, std)
        if config.loss == "focal_r":
            return focal_r(logits, values, mask, mean, std, config.gamma, config.focal_r_beta)
        return mse(logits, values, mask, mean, std)

    def _orthogonality(self) -> Tensor:
        if self.config.orthogonality == "so":
            return soft_orthogonality(self.head.hidden_weights())
        return task_orthogonality(self.head.output_weights())

    def _start_scale_(self, labels: Values) -> None:
        decoder, spread = self.decoder, np.nanstd(labels, axis=0)
        decoder.mean.copy_(torch.from_numpy(np.nanmean(labels, axis=0)))
        decoder.std.copy_(torch.from_numpy(np.where(spread > 0, spread, 1.0)))
        if self.config.encoding.kind == "gaussian":
            # μ 0 and log σ² 0: the labels' own mean and spread, the best guess without pictures.
            shape = (len(self.targets), self.config.encoding.width)
            self.head.set_output_bias_(torch.zeros(shape))

    def _start_bias_(self, labels: Values) -> None:
        """Set the output biases to how often each bit is set in the training labels.

        A head then starts near the labels' mean instead of the middle of their range.
        """
        decoder = self.decoder
        values = torch.from_numpy(labels).to(decoder.low.device)
        bits = encode(values, decoder.low, decoder.span, self.config.encoding)
        labelled = (~values.isnan()).unsqueeze(-1)
        often = (bits * labelled).sum(dim=0) / labelled.sum(dim=0)
        # One and a half labels at least on either side: no bit starts as certain.
        least = 1.5 / (labelled.sum(dim=0) + 3)
        prior = torch.logit(torch.minimum(torch.maximum(often, least), 1 - least)).float()
        self.head.set_output_bias_(prior)
