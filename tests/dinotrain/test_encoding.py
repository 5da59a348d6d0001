"""Codes against the plain integer formulas of METHODS B4, written a second time and slowly."""

import itertools

import pytest
import torch

from dinotrain.encoding import Decoder, Encoding, encode
from dinotrain.errors import ShapeError, UsageError

LOW, SPAN = [-6.0, 0.0, 0.0], [16.0, 16.0, 32.0]


def slow_bits(value: float, low: float, span: float, bits: int, gray: bool) -> list[int]:
    level = int((value - low) / span * 2**bits)
    level = min(max(level, 0), 2**bits - 1)
    text = format(level, f"0{bits}b")
    if not gray:
        return [int(c) for c in text]
    return [int(text[0])] + [int(a) ^ int(b) for a, b in itertools.pairwise(text)]


def slow_soft(probabilities: list[float], low: float, span: float, gray: bool) -> float:
    """Expectation over all bit patterns, each weighted by its probability."""
    bits = len(probabilities)
    mean = 0.0
    for pattern in range(2**bits):
        code = [(pattern >> (bits - 1 - k)) & 1 for k in range(bits)]
        weight = 1.0
        for bit, p in zip(code, probabilities, strict=True):
            weight *= p if bit else 1 - p
        if gray:
            for k in range(1, bits):
                code[k] ^= code[k - 1]
        level = int("".join(map(str, code)), 2)
        mean += weight * (level + 0.5) / 2**bits
    return low + span * mean


def random_values(count: int, seed: int = 0) -> torch.Tensor:
    draw = torch.rand(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return draw * torch.tensor(SPAN).double() + torch.tensor(LOW).double()


@pytest.mark.parametrize("kind", ["plain", "gray"])
@pytest.mark.parametrize("bits", range(1, 25))
def test_encode_matches_the_integer_formula(bits, kind):
    values = random_values(50)
    code = Encoding(kind=kind, bits=bits)
    found = encode(values, torch.tensor(LOW), torch.tensor(SPAN), code)
    wanted = [
        [
            slow_bits(v, low, span, bits, kind == "gray")
            for v, low, span in zip(row, LOW, SPAN, strict=True)
        ]
        for row in values.tolist()
    ]
    assert found.tolist() == wanted


@pytest.mark.parametrize("decoding", ["soft", "hard"])
@pytest.mark.parametrize("kind", ["plain", "gray"])
@pytest.mark.parametrize("bits", range(1, 25))
def test_round_trip_is_within_half_a_level(bits, kind, decoding):
    values = random_values(50, seed=1)
    code = Encoding(kind=kind, bits=bits, decoding=decoding)
    coded = encode(values, torch.tensor(LOW), torch.tensor(SPAN), code)
    decoder = Decoder(code, LOW, SPAN)
    # ±40: sigmoid is 0 or 1 to float32.
    back = decoder((coded * 2 - 1) * 40)
    half_level = torch.tensor(SPAN) / 2 ** (bits + 1)
    # float32 carries 24 binary digits of at most 32 mm: 4e-6 mm, on each side of a sum.
    assert bool(((back - values).abs() <= half_level + 8e-6).all())


@pytest.mark.parametrize("kind", ["plain", "gray"])
@pytest.mark.parametrize("bits", [1, 2, 5, 8])
def test_soft_decoding_is_the_mean_over_all_patterns(bits, kind):
    logits = torch.randn(4, 3, bits, generator=torch.Generator().manual_seed(bits)) * 2
    found = Decoder(Encoding(kind=kind, bits=bits), LOW, SPAN)(logits)
    for row in range(4):
        for target in range(3):
            p = torch.sigmoid(logits[row, target].double()).tolist()
            wanted = slow_soft(p, LOW[target], SPAN[target], kind == "gray")
            # float32 sums of at most 8 terms below 32 mm.
            assert found[row, target].item() == pytest.approx(wanted, abs=2e-5)


@pytest.mark.parametrize("kind", ["plain", "gray"])
def test_hard_decoding_reads_the_sign_of_each_logit(kind):
    bits = 6
    logits = torch.randn(20, 3, bits, generator=torch.Generator().manual_seed(3))
    found = Decoder(Encoding(kind=kind, bits=bits, decoding="hard"), LOW, SPAN)(logits)
    certain = (logits > 0).double()
    for row in range(20):
        for target in range(3):
            wanted = slow_soft(
                certain[row, target].tolist(), LOW[target], SPAN[target], kind == "gray"
            )
            assert found[row, target].item() == pytest.approx(wanted, abs=2e-5)


def test_a_reversed_bit_order_is_caught():
    """The planted fault: the round trip above must not pass when the bits are read backwards."""
    values = random_values(50, seed=1)
    code = Encoding(kind="plain", bits=8)
    coded = encode(values, torch.tensor(LOW), torch.tensor(SPAN), code).flip(-1)
    back = Decoder(code, LOW, SPAN)((coded * 2 - 1) * 40)
    assert (back - values).abs().max() > 1.0


def test_values_outside_are_clipped_and_nan_is_zero():
    code = Encoding(kind="plain", bits=4)
    values = torch.tensor([[-100.0], [100.0], [float("nan")]])
    found = encode(values, torch.tensor([0.0]), torch.tensor([16.0]), code)
    assert found[:, 0].tolist() == [[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]


def test_scalar_decodes_a_z_score():
    decoder = Decoder(Encoding(kind="scalar"), LOW, SPAN)
    decoder.mean.copy_(torch.tensor([3.0, 5.0, 12.0]))
    decoder.std.copy_(torch.tensor([1.0, 2.0, 4.0]))
    found = decoder(torch.tensor([[[1.0], [-1.0], [0.5]]]))
    assert found.tolist() == [[4.0, 3.0, 14.0]]


@pytest.mark.parametrize("bits", [0, 25])
def test_bits_outside_float32_are_refused(bits):
    with pytest.raises(UsageError, match=f"{bits} bits"):
        Encoding(bits=bits)


def test_a_foreign_width_is_refused():
    with pytest.raises(ShapeError, match="7 numbers"):
        Decoder(Encoding(bits=8), LOW, SPAN)(torch.zeros(1, 3, 7))
    with pytest.raises(UsageError, match="scalar"):
        encode(torch.zeros(1, 1), torch.zeros(1), torch.ones(1), Encoding(kind="scalar"))
