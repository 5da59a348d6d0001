"""The figures of parity against plain sums, values found by hand, and what cannot be compared."""

import math

import numpy as np
import pytest

from dinoexport.verify.metrics import MAX_DB, cosine, max_error, sqnr_db

BAD = 1e30


def plain_sqnr(reference: np.ndarray, actual: np.ndarray) -> float:
    """The formula number by number, with sums that do not round."""
    pairs = list(zip(reference.ravel().tolist(), actual.ravel().tolist(), strict=True))
    signal = math.fsum(r * r for r, _ in pairs)
    noise = math.fsum((a - r) ** 2 for r, a in pairs)
    return 10 * math.log10(signal / noise)


@pytest.mark.parametrize("noise", [1e-7, 1e-3, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5, 2), (6, 1024)])
def test_sqnr_is_the_formula(shape: tuple[int, ...], noise: float) -> None:
    rng = np.random.default_rng(0)
    reference = rng.standard_normal(shape).astype(np.float32)
    actual = (reference + noise * rng.standard_normal(shape)).astype(np.float32)
    # Both sum in float64: 16 digits, of which the sums here lose at most three.
    assert sqnr_db(reference, actual) == pytest.approx(plain_sqnr(reference, actual), abs=1e-9)
    worst = max(abs(float(a) - float(r)) for r, a in zip(reference.flat, actual.flat, strict=True))
    assert max_error(reference, actual) == worst


def test_values_found_by_hand() -> None:
    one = np.ones(4)
    assert sqnr_db(one, one * 1.1) == pytest.approx(20.0)
    assert sqnr_db(one, one * 1.001) == pytest.approx(60.0)
    assert sqnr_db(one, one * 2) == 0.0
    assert sqnr_db(one, -one) == pytest.approx(-6.0206, abs=1e-4)
    # One value of a hundred is off by 0.1: noise 0.01, signal 100.
    spike = np.ones(100)
    spike[3] = 1.1
    assert sqnr_db(np.ones(100), spike) == pytest.approx(40.0)
    assert max_error(np.array([1.0, -2.0]), np.array([1.5, -4.0])) == 2.0


def test_the_sum_is_not_rounded_to_float32() -> None:
    """Summed in float32, a million small errors beside a large one would vanish."""
    reference = np.full(2**20, 1.0, np.float32)
    actual = reference.copy()
    actual[0] = 5001.0
    actual[1:] += np.float32(2**-12)
    exact = 10 * math.log10(2**20 / (5000.0**2 + (2**20 - 1) * 2**-24))
    assert sqnr_db(reference, actual) == pytest.approx(exact, abs=1e-9)


def test_equal_and_zero() -> None:
    some, none = np.arange(5.0), np.zeros(5)
    assert sqnr_db(some, some) == MAX_DB
    assert sqnr_db(none, none) == MAX_DB
    assert max_error(some, some) == 0.0
    # Noise without a signal has no ratio; it must not pass.
    assert sqnr_db(none, some) == -MAX_DB
    assert sqnr_db(some, none) == 0.0
    assert sqnr_db(np.float32(-0.0), np.float32(0.0)) == MAX_DB


def test_it_ends_at_200_db() -> None:
    assert sqnr_db(np.ones(1), np.array([1 + 1e-15])) == MAX_DB
    assert sqnr_db(np.array([1e-15]), np.ones(1)) == -MAX_DB


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_passes(value: float) -> None:
    good, bad = np.ones(1000), np.ones(1000)
    bad[567] = value
    # Two that agree on NaN agree on nothing.
    for pair in ((good, bad), (bad, good), (bad, bad)):
        assert sqnr_db(*pair) == -MAX_DB
        assert max_error(*pair) == BAD


@pytest.mark.parametrize(
    ("first", "second"), [((6,), (7,)), ((6,), (6, 1)), ((2, 3), (3, 2)), ((1,), ())]
)
def test_misshapen_never_passes(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    """Without this NumPy would repeat the smaller one, and find both equal."""
    assert sqnr_db(np.ones(first), np.ones(second)) == -MAX_DB
    assert max_error(np.ones(first), np.ones(second)) == BAD


def test_nothing_never_passes() -> None:
    empty = np.zeros((0, 4))
    assert sqnr_db(empty, empty) == -MAX_DB
    assert max_error(empty, empty) == BAD


def test_types_are_mixed_safely() -> None:
    """In uint8 3 − 5 would be 254; in float16 the squares of 300 would overflow."""
    assert max_error(np.array([3], np.uint8), np.array([5], np.uint8)) == 2.0
    half = np.full(3, 300, np.float16)
    assert sqnr_db(half, half * np.float16(0.5)) == pytest.approx(6.0206, abs=1e-4)


def test_cosines_found_by_hand() -> None:
    east, north = np.array([2.0, 0.0]), np.array([0.0, 3.0])
    assert cosine(east, north) == 0
    assert cosine(east, east + 2 * north / 3) == pytest.approx(math.sqrt(0.5))
    assert cosine(east, 5 * east) == 1
    assert cosine(east, -east) == -1
    # As vectors, whatever the shape.
    assert cosine(np.eye(2), np.ones((2, 2))) == pytest.approx(math.sqrt(0.5))
    assert cosine(np.zeros(3), np.zeros(3)) == 1


@pytest.mark.parametrize("actual", [np.ones(3), np.array([1, np.nan]), np.zeros(2)])
def test_what_cannot_be_compared_has_no_angle(actual: np.ndarray) -> None:
    assert cosine(np.ones(2), actual) == -1
