"""Codes against the plain integer formulas of METHODS B4, written a second time and slowly."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from dinotrain.encoding import Decoder, Encoding, code_matrix, encode
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


def test_a_gaussian_decodes_to_its_mean():
    decoder = Decoder(Encoding(kind="gaussian"), LOW, SPAN)
    decoder.mean.copy_(torch.tensor([3.0, 5.0, 12.0]))
    decoder.std.copy_(torch.tensor([1.0, 2.0, 4.0]))
    found = decoder(torch.tensor([[[1.0, 7.0], [-1.0, 0.0], [0.5, -9.0]]]))
    assert found.tolist() == [[4.0, 3.0, 14.0]]
    with pytest.raises(UsageError, match="gaussian encoding has no bits"):
        encode(torch.zeros(1, 3), torch.zeros(3), torch.ones(3), decoder.encoding)


@pytest.mark.parametrize("bits", [0, 25])
def test_bits_outside_float32_are_refused(bits):
    with pytest.raises(UsageError, match=f"{bits} bits"):
        Encoding(bits=bits)


def test_a_foreign_width_is_refused():
    with pytest.raises(ShapeError, match="7 numbers"):
        Decoder(Encoding(bits=8), LOW, SPAN)(torch.zeros(1, 3, 7))
    with pytest.raises(UsageError, match="scalar"):
        encode(torch.zeros(1, 1), torch.zeros(1), torch.ones(1), Encoding(kind="scalar"))


CODES = ("plain", "gray", "thermometer", "johnson")
LONG_CODES = ("thermometer", "johnson")


def slow_long_code(level: int, kind: str, levels: int) -> list[int]:
    """Thermometer by counting, Johnson by running its ring counter for ``level`` steps."""
    if kind == "thermometer":
        return [1] * level + [0] * (levels - 1 - level)
    register = [0] * (levels // 2)
    for _ in range(level):
        register = [*register[1:], 1 - register[0]]
    return register


def slow_scores(logits: list[float], kind: str, levels: int) -> list[float]:
    """s = zC by its definition: add a logit where the code has a 1, subtract it elsewhere."""
    codes = [slow_long_code(level, kind, levels) for level in range(levels)]
    return [sum(z if b else -z for z, b in zip(logits, code, strict=True)) for code in codes]


@pytest.mark.parametrize(("kind", "width"), [("thermometer", 255), ("johnson", 128)])
def test_a_long_code_grows_with_the_levels(kind, width):
    code = Encoding(kind=kind, bits=8)
    assert (code.levels, code.width) == (256, width)
    assert code_matrix(code).shape == (width, 256)


@pytest.mark.parametrize("kind", LONG_CODES)
@pytest.mark.parametrize("bits", [1, 2, 3, 6])
def test_long_codes_match_the_counter(bits, kind):
    code = Encoding(kind=kind, bits=bits)
    levels = 2**bits
    values = (torch.arange(levels).double().unsqueeze(1) + 0.5) / levels * 16 - 6
    found = encode(values, torch.tensor([-6.0]), torch.tensor([16.0]), code)
    wanted = [slow_long_code(level, kind, levels) for level in range(levels)]
    assert found[:, 0].tolist() == wanted
    assert code_matrix(code).T.tolist() == [[2.0 * b - 1 for b in row] for row in wanted]


@pytest.mark.parametrize("kind", ["gray", "thermometer", "johnson"])
def test_neighbours_differ_in_one_bit(kind):
    values = torch.arange(64).double().unsqueeze(1) / 4 + 0.1
    bits = encode(values, torch.tensor([0.0]), torch.tensor([16.0]), Encoding(kind=kind, bits=6))
    changed = (bits[1:, 0] != bits[:-1, 0]).sum(dim=-1)
    assert changed.tolist() == [1] * 63
    if kind == "johnson":
        # Each bit goes up once and down once: what makes it easy to learn.
        assert int((bits[1:, 0] != bits[:-1, 0]).sum(dim=0).max()) == 2


@pytest.mark.parametrize("decoding", ["soft", "hard"])
@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_level_comes_back(bits, kind, decoding):
    code = Encoding(kind=kind, bits=bits, decoding=decoding)
    levels = 2**bits
    centers = (torch.arange(levels).double().unsqueeze(1) + 0.5) / levels
    values = centers * torch.tensor(SPAN).double() + torch.tensor(LOW).double()
    coded = encode(values, torch.tensor(LOW), torch.tensor(SPAN), code)
    back = Decoder(code, LOW, SPAN)((coded * 2 - 1) * 40)
    # float32 carries 24 binary digits of at most 32 mm.
    torch.testing.assert_close(back.double(), values, atol=8e-6, rtol=0)


@pytest.mark.parametrize("decoding", ["soft", "hard"])
@pytest.mark.parametrize("kind", LONG_CODES)
@pytest.mark.parametrize("bits", [1, 2, 5])
def test_long_codes_decode_by_their_code_matrix(bits, kind, decoding):
    code = Encoding(kind=kind, bits=bits, decoding=decoding)
    levels = 2**bits
    logits = torch.randn(5, 3, code.width, generator=torch.Generator().manual_seed(bits))
    found = Decoder(code, LOW, SPAN)(logits)
    for row in range(5):
        for target in range(3):
            scores = slow_scores(logits[row, target].double().tolist(), kind, levels)
            if decoding == "hard":
                level = float(scores.index(max(scores)))
            else:
                weights = [math.exp(s - max(scores)) for s in scores]
                level = sum(q * w for q, w in enumerate(weights)) / sum(weights)
            wanted = LOW[target] + SPAN[target] * (level + 0.5) / levels
            # float32 sums of at most 32 terms below 32 mm.
            assert found[row, target].item() == pytest.approx(wanted, abs=5e-5)


@pytest.mark.parametrize("kind", LONG_CODES)
def test_a_reversed_code_matrix_is_caught(kind):
    """The planted fault: levels must not come back through a matrix in the wrong order."""
    code = Encoding(kind=kind, bits=6)
    values = random_values(50, seed=2)
    coded = encode(values, torch.tensor(LOW), torch.tensor(SPAN), code)
    decoder = Decoder(code, LOW, SPAN)
    decoder.codebook.copy_(decoder.codebook.flip(0))
    assert (decoder((coded * 2 - 1) * 40) - values).abs().max() > 1.0


def test_long_codes_refuse_what_is_too_wide():
    message = "12 bits, which is 4095 logits per target; 1 to 10 bits are accepted"
    with pytest.raises(UsageError, match=message):
        Encoding(kind="thermometer", bits=12)
    with pytest.raises(UsageError, match="11 bits, which is 1024 logits"):
        Encoding(kind="johnson", bits=11)
    assert Encoding(kind="thermometer", bits=10).width == 1023
    with pytest.raises(UsageError, match="gray encoding has no code matrix"):
        code_matrix(Encoding(kind="gray"))


SIGMA = 0.03
"""Of the posterior in METHODS B4's example, in units of the range."""


def decoding_errors(kind: str, decoding: str) -> np.ndarray:
    """Decoded minus posterior mean, in σ, for Gaussian posteriors with calibrated bits."""
    code = Encoding(kind=kind, bits=8, decoding=decoding)
    levels = code.levels
    centers = (np.arange(levels) + 0.5) / levels
    # 2001 positions meet the middle, where the cliff is highest, and keep 5σ from both ends.
    means = np.linspace(0.15, 0.85, 2001)
    edges = stats.norm.cdf((np.arange(levels + 1) / levels - means[:, None]) / SIGMA)
    posterior = np.diff(edges, axis=1)
    posterior /= posterior.sum(axis=1, keepdims=True)
    values = torch.from_numpy(centers).unsqueeze(1)
    bits = encode(values, torch.zeros(1), torch.ones(1), code)[:, 0].double().numpy()
    p = np.clip(posterior @ bits, 1e-12, 1 - 1e-12)
    logits = torch.from_numpy(np.log(p / (1 - p))).unsqueeze(1)
    found = Decoder(code, [0.0], [1.0])(logits)[:, 0].double().numpy()
    return (found - posterior @ centers) / SIGMA


@pytest.mark.parametrize(
    ("kind", "decoding", "worst", "rmse"),
    [
        # METHODS B4 states 11.8σ and 0.63σ; both depend on where the posteriors lie, and the worst
        # on how near the middle they come (all bits wrong there is 0.5 / 0.03 = 16.7σ).
        ("plain", "hard", (10, 17), (0.4, 0.8)),
        ("gray", "hard", (0.15, 0.4), (0.09, 0.12)),
        ("gray", "soft", (0.05, 0.15), (0.06, 0.08)),
        ("plain", "soft", (0, 1e-4), (0, 1e-4)),
        # Half a level is 0.065σ: nothing but quantisation is left.
        ("thermometer", "hard", (0.06, 0.07), (0.03, 0.04)),
        ("johnson", "hard", (0.06, 0.07), (0.03, 0.04)),
        ("thermometer", "soft", (0, 1e-3), (0, 1e-3)),
        ("johnson", "soft", (0, 1e-3), (0, 1e-3)),
    ],
)
def test_cliffs_are_as_high_as_published(kind, decoding, worst, rmse):
    errors = decoding_errors(kind, decoding)
    assert worst[0] <= np.abs(errors).max() <= worst[1]
    assert rmse[0] <= np.sqrt((errors**2).mean()) <= rmse[1]


@pytest.mark.parametrize("decoding", ["soft", "hard"])
@pytest.mark.parametrize("kind", [*CODES, "scalar", "gaussian"])
def test_decoding_exports(kind, decoding):
    decoder = Decoder(Encoding(kind=kind, bits=6, decoding=decoding), LOW, SPAN).eval()
    width = decoder.encoding.width
    logits = torch.randn(1, 5, 3, width, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(decoder, (logits,)).run_decompositions({})
    for node in program.graph.nodes:
        shape = getattr(node.meta.get("val"), "shape", ())
        assert len(shape) <= 4, f"{node.name} has {len(shape)} dimensions"
    torch.testing.assert_close(program.module()(logits), decoder(logits), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["plain", "gray", "scalar", "gaussian"])
def test_short_codes_keep_what_checkpoints_hold(kind):
    decoder = Decoder(Encoding(kind=kind, bits=3), LOW, SPAN)
    assert list(decoder.state_dict()) == ["mean", "std"]
    names = [name for name, _ in decoder.named_buffers()]
    assert names == ["low", "span", "bit_weights", "mean", "std"]


@pytest.mark.parametrize("kind", LONG_CODES)
def test_long_codes_add_nothing_to_checkpoints(kind):
    assert list(Decoder(Encoding(kind=kind, bits=3), LOW, SPAN).state_dict()) == ["mean", "std"]
