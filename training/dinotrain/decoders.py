"""From logits to the named values of a task: the last part of the deploy graph, in float32."""

from collections.abc import Sequence

from torch import Tensor

from dinotrain.encoding import Decoder, Encoding
from dinotrain.tasks.base import TargetSpec


class MeasureDecoder(Decoder):
    """Decode each member and reduce: the mean, and for an ensemble the spread between members.

    Args:
        encoding: how the targets are written.
        targets: their names, units and ranges, in the order of the logits.

    Source: METHODS B4, B6 (bit members: the decoded mean equals decoding the averaged bits for the
    plain code, which is linear).
    """

    def __init__(self, encoding: Encoding, targets: Sequence[TargetSpec]) -> None:
        super().__init__(encoding, [t.low for t in targets], [t.span for t in targets])
        self.targets = tuple(targets)

    def forward(self, logits: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Decode.

        Args:
            logits: (B, members, targets, width).

        Returns:
            {output name: (B,) float32}. The standard deviation is the population one over members
            (what the members disagree on; it does not contain the noise of the labels).
        """
        values = super().forward(logits)
        mean = values.mean(dim=1)
        outputs = {spec.output_name: mean[:, i] for i, spec in enumerate(self.targets)}
        if logits.shape[1] == 1:
            return outputs
        std = ((values - mean.unsqueeze(1)) ** 2).mean(dim=1).sqrt()
        return outputs | {spec.std_name: std[:, i] for i, spec in enumerate(self.targets)}
