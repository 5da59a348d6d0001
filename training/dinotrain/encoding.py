"""Between millimetres and logits: what a head learns of a value, and how it is read back.

A code scales a value into [0, 1) and cuts it to ``bits`` binary digits, which number its level. The
level is written as plain binary or Gray code, most significant bit first, or as a thermometer or
Johnson code, which spend more bits to keep neighbours one bit apart. Decoding runs in float32 with
fractional weights, because half precision holds whole numbers only to 2048. Beside the codes stand
z-scores, alone or with their variance. Source: METHODS B4, B6.
"""

from typing import Literal

import msgspec
import torch
from torch import Tensor, nn

from dinotrain.errors import ShapeError, UsageError
from dinotrain.heads.gaussian import WIDTH as GAUSSIAN_WIDTH

MAX_BITS = 24
MAX_MATRIX_BITS = 10
"""Of codes whose width doubles with each bit: 1023 logits per target and 4 MB of code matrix, for
levels of 1/64 mm in a range of 16 mm, far below the noise of any label."""

CODE_MATRIX_KINDS = ("thermometer", "johnson")
Z_SCORE_KINDS = ("scalar", "gaussian")
"""Written as numbers that the training labels' mean and standard deviation scale."""

EncodingKind = Literal["plain", "gray", "thermometer", "johnson", "scalar", "gaussian"]


class Encoding(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How one target is written: as a code of 2^bits levels, or as a z-score.

    Plain and Gray codes are ``bits`` logits wide, a Johnson code levels / 2, a thermometer
    levels − 1. A Johnson code is a ring: its first and last level are neighbours too, so keep
    values away from the ends of the range. ``scalar`` is a z-score, ``gaussian`` a z-score and the
    logarithm of its variance.
    """

    kind: EncodingKind = "gray"
    bits: int = 8
    decoding: Literal["soft", "hard"] = "soft"

    def __post_init__(self) -> None:
        """Refuse a number of bits that float32, or a head, cannot hold."""
        if not 1 <= self.bits <= MAX_BITS:
            raise UsageError(f"encoding has {self.bits} bits; 1 to {MAX_BITS} are accepted")
        if self.kind in CODE_MATRIX_KINDS and self.bits > MAX_MATRIX_BITS:
            raise UsageError(
                f"{self.kind} encoding has {self.bits} bits, which is {self.width} logits per "
                f"target; 1 to {MAX_MATRIX_BITS} bits are accepted. Use fewer, or plain or gray."
            )

    @property
    def levels(self) -> int:
        """Values that a code tells apart."""
        return 2**self.bits

    @property
    def width(self) -> int:
        """Logits per target."""
        widths = {
            "scalar": 1,
            "gaussian": GAUSSIAN_WIDTH,
            "thermometer": self.levels - 1,
            "johnson": self.levels // 2,
        }
        return widths.get(self.kind, self.bits)


def encode(values: Tensor, low: Tensor, span: Tensor, encoding: Encoding) -> Tensor:
    """Write values as bits.

    Args:
        values: (..., targets), in the targets' units; clipped into their ranges.
        low: (targets,), lower end of each range.
        span: (targets,), width of each range.
        encoding: a code, so neither scalar nor gaussian.

    Returns:
        (..., targets, width), float32, 0 or 1. Plain and Gray: most significant bit first.
        Thermometer: bit k, from 1 on, is set where the level is at least k. Johnson: see
        ``code_matrix``. NaN values give the bits of level 0: mask them.

    Source: METHODS B4.
    """
    if encoding.kind in Z_SCORE_KINDS:
        raise UsageError(f"a {encoding.kind} encoding has no bits; use plain or gray")
    levels = encoding.levels
    # float64: at 24 bits a float32 product would round across a level.
    unit = (values.double() - low.double()) / span.double()
    whole = (unit.nan_to_num(0.0) * levels).floor().clamp(0, levels - 1).long()
    if encoding.kind in CODE_MATRIX_KINDS:
        return _long_code(whole, encoding)
    if encoding.kind == "gray":
        whole = whole ^ (whole >> 1)
    shifts = torch.arange(encoding.bits - 1, -1, -1, device=values.device)
    return ((whole.unsqueeze(-1) >> shifts) & 1).float()


def code_matrix(encoding: Encoding) -> Tensor:
    """Return the code of every level as signs: (width, levels), float32, −1 or 1.

    With Q levels, thermometer row k (from 1 on) is 1 from level k on; Johnson row i (from 0 on) of
    M = Q / 2 is 1 for levels M − i to 2M − i − 1.

    Raises:
        UsageError: the encoding has no code matrix.

    Source: METHODS B4 (BEL-U and BEL-J).
    """
    if encoding.kind not in CODE_MATRIX_KINDS:
        raise UsageError(
            f"a {encoding.kind} encoding has no code matrix; {' and '.join(CODE_MATRIX_KINDS)} have"
        )
    return _long_code(torch.arange(encoding.levels), encoding).T.contiguous() * 2 - 1


def _long_code(level: Tensor, encoding: Encoding) -> Tensor:
    """Thermometer or Johnson bits of whole levels: (...) → (..., width), float32, 0 or 1."""
    level, width = level.unsqueeze(-1), encoding.width
    row = torch.arange(width, device=level.device)
    if encoding.kind == "thermometer":
        return (level >= row + 1).float()
    return ((level >= width - row) & (level < 2 * width - row)).float()


class Decoder(nn.Module):
    """Logits to values in the targets' units; a part of the deploy graph.

    Args:
        encoding: how the targets are written.
        low: lower end of each target's range.
        span: width of each target's range.

    The buffers ``mean`` and ``std`` belong to z-scores and are set when training starts.
    Source: METHODS B4.
    """

    low: Tensor
    span: Tensor
    bit_weights: Tensor
    codebook: Tensor
    level_centers: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, encoding: Encoding, low: list[float], span: list[float]) -> None:
        super().__init__()
        self.encoding = encoding
        self.register_buffer("low", torch.tensor(low, dtype=torch.float32), persistent=False)
        self.register_buffer("span", torch.tensor(span, dtype=torch.float32), persistent=False)
        if encoding.kind in CODE_MATRIX_KINDS:
            centers = (torch.arange(encoding.levels) + 0.5) / encoding.levels
            self.register_buffer("codebook", code_matrix(encoding), persistent=False)
            self.register_buffer("level_centers", centers, persistent=False)
        else:
            powers = torch.arange(1, encoding.width + 1, dtype=torch.float64)
            self.register_buffer("bit_weights", (0.5**powers).float(), persistent=False)
        self.register_buffer("mean", torch.zeros(len(low)))
        self.register_buffer("std", torch.ones(len(low)))

    def forward(self, logits: Tensor) -> Tensor:
        """Turn logits into values.

        Args:
            logits: (..., targets, width), in the order of ``encode``.

        Returns:
            (..., targets), float32, in the targets' units; of a Gaussian its mean.

        Raises:
            ShapeError: the last axis is not the encoding's width.
        """
        if logits.shape[-1] != self.encoding.width:
            raise ShapeError(
                f"logits have {logits.shape[-1]} numbers per target, the encoding has "
                f"{self.encoding.width}"
            )
        logits = logits.float()
        if self.encoding.kind in Z_SCORE_KINDS:
            return self.mean + self.std * logits[..., 0]
        half_level = 0.5 ** (self.encoding.bits + 1)
        if self.encoding.kind not in CODE_MATRIX_KINDS:
            unit = (self.bit_probabilities(logits) * self.bit_weights).sum(dim=-1) + half_level
        elif self.encoding.decoding == "soft":
            unit = (self.level_scores(logits).softmax(dim=-1) * self.level_centers).sum(dim=-1)
        else:
            level = self.level_scores(logits).argmax(dim=-1)
            unit = level.float() / self.encoding.levels + half_level
        return self.low + self.span * unit

    def level_scores(self, logits: Tensor) -> Tensor:
        """Score every level by its code, s = zC: (..., targets, width) → (..., targets, levels).

        Thermometer and Johnson codes only. The scores are the logits of a softmax over levels.
        """
        return logits.float() @ self.codebook

    def bit_probabilities(self, logits: Tensor) -> Tensor:
        """Probability (soft) or value (hard) of each bit of the plain code, shaped as ``logits``.

        Plain and Gray codes only.
        """
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
