"""Binary codes between millimetres and bit logits: what a head learns, and how it is read back.

A value is scaled into [0, 1), cut to ``bits`` binary digits, and written as plain binary or Gray
code, most significant bit first. Decoding runs in float32 with fractional bit weights, because
half precision holds whole numbers only to 2048. Source: METHODS B4.
"""

from typing import Literal

import msgspec
import torch
from torch import Tensor, nn

from dinotrain.errors import ShapeError, UsageError

MAX_BITS = 24


class Encoding(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How one target is written: ``scalar`` is one z-scored number, a code is ``bits`` logits."""

    kind: Literal["plain", "gray", "scalar"] = "gray"
    bits: int = 8
    decoding: Literal["soft", "hard"] = "soft"

    def __post_init__(self) -> None:
        """Refuse a number of bits that float32 cannot hold."""
        if not 1 <= self.bits <= MAX_BITS:
            raise UsageError(f"encoding has {self.bits} bits; 1 to {MAX_BITS} are accepted")

    @property
    def width(self) -> int:
        """Logits per target."""
        return 1 if self.kind == "scalar" else self.bits


def encode(values: Tensor, low: Tensor, span: Tensor, encoding: Encoding) -> Tensor:
    """Write values as bits.

    Args:
        values: (..., targets), in the targets' units; clipped into their ranges.
        low: (targets,), lower end of each range.
        span: (targets,), width of each range.
        encoding: plain or gray.

    Returns:
        (..., targets, bits), float32, 0 or 1, most significant bit first. NaN values give 0 bits:
        mask them.

    Source: METHODS B4.
    """
    if encoding.kind == "scalar":
        raise UsageError("a scalar encoding has no bits; use plain or gray")
    levels = 2**encoding.bits
    # float64: at 24 bits a float32 product would round across a level.
    unit = (values.double() - low.double()) / span.double()
    whole = (unit.nan_to_num(0.0) * levels).floor().clamp(0, levels - 1).long()
    if encoding.kind == "gray":
        whole = whole ^ (whole >> 1)
    shifts = torch.arange(encoding.bits - 1, -1, -1, device=values.device)
    return ((whole.unsqueeze(-1) >> shifts) & 1).float()


class Decoder(nn.Module):
    """Logits to values in the targets' units; a part of the deploy graph.

    Args:
        encoding: how the targets are written.
        low: lower end of each target's range.
        span: width of each target's range.

    The buffers ``mean`` and ``std`` belong to the scalar encoding and are set when training starts.
    Source: METHODS B4.
    """

    low: Tensor
    span: Tensor
    bit_weights: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, encoding: Encoding, low: list[float], span: list[float]) -> None:
        super().__init__()
        self.encoding = encoding
        powers = torch.arange(1, encoding.width + 1, dtype=torch.float64)
        self.register_buffer("low", torch.tensor(low, dtype=torch.float32), persistent=False)
        self.register_buffer("span", torch.tensor(span, dtype=torch.float32), persistent=False)
        self.register_buffer("bit_weights", (0.5**powers).float(), persistent=False)
        self.register_buffer("mean", torch.zeros(len(low)))
        self.register_buffer("std", torch.ones(len(low)))

    def forward(self, logits: Tensor) -> Tensor:
        """Turn logits into values.

        Args:
            logits: (..., targets, width), most significant bit first.

        Returns:
            (..., targets), float32, in the targets' units.

        Raises:
            ShapeError: the last axis is not the encoding's width.
        """
        if logits.shape[-1] != self.encoding.width:
            raise ShapeError(
                f"logits have {logits.shape[-1]} numbers per target, the encoding has "
                f"{self.encoding.width}"
            )
        logits = logits.float()
        if self.encoding.kind == "scalar":
            return self.mean + self.std * logits[..., 0]
        half_level = 0.5 ** (self.encoding.bits + 1)
        unit = (self.bit_probabilities(logits) * self.bit_weights).sum(dim=-1) + half_level
        return self.low + self.span * unit

    def bit_probabilities(self, logits: Tensor) -> Tensor:
        """Probability (soft) or value (hard) of each plain bit, shaped as ``logits``."""
        soft = self.encoding.decoding == "soft"
        if self.encoding.kind == "plain":
            return torch.sigmoid(logits) if soft else (logits > 0).float()
        # E[(-1)^g] per Gray bit; plain bit k is their parity, so its expectation is the running
        # product (bits taken as independent). Unrolled: no target has a cumulative product.
        signs = 1 - 2 * torch.sigmoid(logits) if soft else 1 - 2 * (logits > 0).float()
        product = signs[..., :1]
        products = [product]
        for bit in range(1, self.encoding.bits):
            product = product * signs[..., bit : bit + 1]
            products.append(product)
        return 0.5 - 0.5 * torch.cat(products, dim=-1)
