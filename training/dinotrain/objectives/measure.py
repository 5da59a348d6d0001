"""Measured quantities: losses on their codes, validated by their mean absolute error.

Source: METHODS B5, B7.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dinotrain.encoding import encode
from dinotrain.errors import DataError, UsageError
from dinotrain.losses.bits import bit_weights, focal
from dinotrain.losses.orthogonality import task_orthogonality
from dinotrain.losses.regression import mse
from dinotrain.objectives.base import Objective, Predictions, Values

if TYPE_CHECKING:
    from dinotrain.decoders import MeasureDecoder
    from dinotrain.heads.branch import BranchHead
    from dinotrain.train_config import TrainConfig

MIN_LABELS = 2


def choose_loss(config: "TrainConfig") -> str:
    """Return the loss that is named, or cross-entropy of bits and squared error of scalars.

    Raises:
        UsageError: the named loss does not fit the encoding.
    """
    scalar = config.encoding.kind == "scalar"
    accepted = ("mse",) if scalar else ("bce", "focal")
    loss = config.loss or accepted[0]
    if loss not in accepted:
        raise UsageError(
            f"loss '{loss}' does not fit encoding '{config.encoding.kind}' of task {config.task}; "
            f"accepted: {', '.join(accepted)}"
        )
    return loss


class MeasureObjective(Objective):
    """Bits or scalars of targets, missing labels masked.

    Args:
        config: the loss and its settings.
        head: what is trained, on its device.
        decoder: of the same model.
    """

    error_name = "MAE"

    def __init__(
        self, config: "TrainConfig", head: "BranchHead", decoder: "MeasureDecoder"
    ) -> None:
        self.config = config
        self.head = head
        self.decoder = decoder
        self.targets = decoder.targets
        weights = bit_weights(config.encoding.width, config.bit_rho)
        self.bit_weights = weights.to(decoder.low.device)

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
        """Set mean and standard deviation of scalars, or how often each bit is set."""
        if self.config.encoding.kind == "scalar":
            self._start_scale_(labels)
        else:
            self._start_bias_(labels)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of the codes, with the orthogonality between targets."""
        config, decoder = self.config, self.decoder
        mask = ~labels.isnan()
        if config.loss == "mse":
            loss = mse(logits, labels.float(), mask, decoder.mean, decoder.std)
        else:
            bits = encode(labels, decoder.low, decoder.span, config.encoding)
            gamma = config.gamma if config.loss == "focal" else 0.0
            loss = focal(logits, bits, mask, gamma, self.bit_weights)
        if config.or_lambda:
            overlap = task_orthogonality(self.head.output_weights())
            loss = loss + config.or_lambda * overlap
        return loss

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

    def _start_scale_(self, labels: Values) -> None:
        decoder, spread = self.decoder, np.nanstd(labels, axis=0)
        decoder.mean.copy_(torch.from_numpy(np.nanmean(labels, axis=0)))
        decoder.std.copy_(torch.from_numpy(np.where(spread > 0, spread, 1.0)))

    def _start_bias_(self, labels: Values) -> None:
        """Set the output biases to how often each bit is set in the training labels.

        A head then starts near the labels' mean instead of the middle of their range.
        """
        decoder, head = self.decoder, self.head
        values = torch.from_numpy(labels).to(decoder.low.device)
        bits = encode(values, decoder.low, decoder.span, self.config.encoding)
        labelled = (~values.isnan()).unsqueeze(-1)
        often = (bits * labelled).sum(dim=0) / labelled.sum(dim=0)
        # One and a half labels at least on either side: no bit starts as certain.
        least = 1.5 / (labelled.sum(dim=0) + 3)
        prior = torch.logit(torch.minimum(torch.maximum(often, least), 1 - least)).float()
        for member in head.members:
            first = 0
            for branch in head.branches:
                output = member[branch.name][-1]  # type: ignore[index]
                last = first + branch.targets
                with torch.no_grad():
                    output.bias.copy_(prior[first:last].flatten())
                first = last
