"""From logits to the named values of a task: the last part of the deploy graph, in float32."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dinotrain.encoding import Decoder, Encoding
from dinotrain.errors import UsageError
from dinotrain.heads.gaussian import mix, split_members
from dinotrain.intervals import Intervals
from dinotrain.tasks.base import TargetSpec


class MeasureDecoder(Decoder):
    """Decode each member and reduce: the mean, how sure it is, and the interval around it.

    Args:
        encoding: how the targets are written.
        targets: their names, units and ranges, in the order of the logits.
        intervals: constants of the intervals, where there are any.

    Raises:
        UsageError: the intervals are not one per target.

    Source: METHODS B4, B6 (bit members: the decoded mean equals decoding the averaged bits for the
    plain code, which is linear; Gaussian members: their mixture), B8 (intervals).
    """

    interval_factors: Tensor

    def __init__(
        self,
        encoding: Encoding,
        targets: Sequence[TargetSpec],
        intervals: Intervals | None = None,
    ) -> None:
        super().__init__(encoding, [t.low for t in targets], [t.span for t in targets])
        self.targets = tuple(targets)
        self.intervals = intervals
        if intervals is None:
            return
        if len(intervals.factors) != len(self.targets):
            raise UsageError(
                f"intervals have {len(intervals.factors)} factors and there are "
                f"{len(self.targets)} targets; there is one per target"
            )
        factors = torch.tensor(intervals.factors, dtype=torch.float32)
        self.register_buffer("interval_factors", factors, persistent=False)

    def forward(self, logits: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Decode.

        Args:
            logits: (B, members, targets, width).

        Returns:
            {output name: (B,) float32}: the values; their standard deviations, of an ensemble or
            of Gaussians; the lower ends and the upper ends of their intervals, with constants.
            Gaussians state the noise of the labels and, between members, what they disagree on.
            The standard deviation of other ensembles is the population one over members (what
            they disagree on; it does not contain the noise of the labels).

        Raises:
            ShapeError: the last axis is not the encoding's width.
            UsageError: the intervals scale a standard deviation, and there is none.
        """
        values = super().forward(logits)
        mean = values.mean(dim=1)
        std = self._spread(logits, values, mean)
        outputs = {spec.output_name: mean[:, i] for i, spec in enumerate(self.targets)}
        if std is not None:
            outputs |= {spec.std_name: std[:, i] for i, spec in enumerate(self.targets)}
        if self.intervals is None:
            return outputs
        half = self.interval_factors
        if self.intervals.method == "scaled":
            if std is None:
                raise UsageError(
                    "the model's intervals scale a standard deviation, and its head gives none. "
                    "Calibrate it again."
                )
            half = half * std
        for side, ends in enumerate((mean - half, mean + half)):
            outputs |= {t.interval_names[side]: ends[:, i] for i, t in enumerate(self.targets)}
        return outputs

    def _spread(self, logits: Tensor, values: Tensor, mean: Tensor) -> Tensor | None:
        """(B, targets) standard deviations in the targets' units, where the model has any."""
        if self.encoding.kind == "gaussian":
            return self.std * mix(*split_members(logits))[1].sqrt()
        if logits.shape[1] == 1:
            return None
        return ((values - mean.unsqueeze(1)) ** 2).mean(dim=1).sqrt()


class ProbabilityDecoder(nn.Module):
    """Probabilities of exclusive classes: the mean over members of their softmax.

    Source: METHODS B6 (mixture of the members), D.
    """

    def forward(self, logits: Tensor) -> dict[str, Tensor]:
        """Decode.

        Args:
            logits: (B, members, 1, classes).

        Returns:
            ``probabilities`` (B, classes) float32; of an ensemble also ``probabilities_std``, the
            population standard deviation over members.
        """
        members = torch.softmax(logits[:, :, 0].float(), dim=-1)
        mean = members.mean(dim=1)
        if logits.shape[1] == 1:
            return {"probabilities": mean}
        spread = ((members - mean.unsqueeze(1)) ** 2).mean(dim=1).sqrt()
        return {"probabilities": mean, "probabilities_std": spread}


class ClassMapDecoder(nn.Module):
    """The likeliest class of every pixel, the first of equal ones.

    A map of how sure the model is stays out: it would be four bytes a pixel more to copy from a
    phone's accelerator, and argmax needs no softmax.
    """

    def forward(self, logits: Tensor) -> dict[str, Tensor]:
        """(B, classes, H, W) → ``class_map`` (B, H, W) int32, class ids."""
        return {"class_map": logits.argmax(dim=1).to(torch.int32)}
