"""From logits to the named values of a task: the last part of the deploy graph, in float32."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

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
