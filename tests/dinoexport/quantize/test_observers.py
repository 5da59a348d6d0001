"""Observers against plain NumPy on all values at once."""

import numpy as np
import pytest

from dinoexport.quantize.observers import (
    BINS,
    LEAST_WIDTH,
    OBSERVERS,
    PERCENTILE,
    Histogram,
    MinMax,
    Percentile,
    SquaredError,
    divergence,
    get_observer,
    squared_error,
)
from dinotrain.errors import UsageError


def see(*parts: np.ndarray) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.add(part.astype(np.float32))
    return histogram


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    """Mostly a lopsided bulk, and three values far outside of it."""
    bulk = np.random.default_rng(5).gamma(2.0, 0.5, 40_000) - 0.7
    return np.concatenate([bulk, [25.0, 31.0, -9.0]]).astype(np.float32)


def fake_quantized(x: np.ndarray, low: float, high: float) -> np.ndarray:
    step = (high - low) / 255
    zero = np.round(-low / step)
    return (np.clip(np.round(x / step) + zero, 0, 255) - zero) * step


def test_a_histogram_that_widens_holds_what_one_histogram_of_all_holds(values) -> None:
    small, large = values[np.abs(values) < 1], values[np.abs(values) >= 1]
    seen = see(np.zeros(5), small, large)
    assert seen.limit == 32 and seen.minimum == values.min() and seen.maximum == values.max()
    every = np.concatenate([np.zeros(5, np.float32), values])
    wanted, _ = np.histogram(every, bins=BINS, range=(-32, 32))
    assert seen.total == len(every)
    # float32 puts a value at a bin's edge into its neighbour now and then.
    assert np.abs(seen.counts - wanted).sum() < 1e-3 * len(every)


def test_min_max_is_what_was_seen_and_holds_zero(values) -> None:
    assert MinMax().choose(see(values)) == (values.min(), values.max())
    assert MinMax().choose(see(values[values > 0.5]))[0] == 0
    assert MinMax(symmetric=True).choose(see(values)) == (-values.max(), values.max())


def test_the_percentile_is_numpys(values) -> None:
    share = (1 - PERCENTILE / 100) / 2
    low, high = Percentile().choose(see(values))
    # One bin is 64/8192 wide, and the outermost values stand several bins apart.
    near = np.quantile(values, [share, 1 - share], method="inverted_cdf")
    np.testing.assert_allclose([low, high], near, atol=64 / BINS)
    reach = Percentile(symmetric=True).choose(see(values))[1]
    wanted = np.quantile(np.abs(values), PERCENTILE / 100, method="inverted_cdf")
    assert reach == pytest.approx(wanted, abs=64 / BINS)


def test_the_squared_error_is_that_of_rounding(values) -> None:
    seen = see(values)
    for low, high in ((-9.0, 31.0), (-1.0, 5.0)):
        true = np.mean((fake_quantized(values, low, high) - values) ** 2)
        assert squared_error(seen, low, high) == pytest.approx(true, rel=0.03)
    low, high = SquaredError().choose(seen)
    chosen = np.mean((fake_quantized(values, low, high) - values) ** 2)
    ends = [(a, b) for a in np.linspace(-9, 0, 46) for b in np.linspace(0.6, 31, 77)]
    least = min(np.mean((fake_quantized(values, a, b) - values) ** 2) for a, b in ends)
    assert chosen <= 1.1 * least  # the grids differ
    assert low > -9 and high <= 31  # clipping −9, one value of 40,000, pays


def test_entropy_cuts_the_tail_that_says_nothing() -> None:
    rng = np.random.default_rng(6)
    bulk = rng.normal(size=200_000)
    _, high = get_observer("entropy").choose(see(np.append(bulk, 300.0)))
    assert high < 50
    low, high = get_observer("entropy").choose(see(bulk))
    # Without an outlier, little of the bulk itself may go.
    assert np.mean((bulk < low) | (bulk > high)) < 0.01


def test_the_divergence_is_that_of_its_definition() -> None:
    sizes = np.array([4.0, 0, 6, 2, 1, 3, 5, 5])
    p = np.array([4.0, 0, 6, 2, 1, 8])
    # Six bins at three levels; empty bins stay empty; what is clipped counts in p alone.
    q = np.array([4.0, 0, 4, 4, 2, 2])
    p, q = p / p.sum(), q / q.sum()
    wanted = sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a)
    assert divergence(sizes[[0, 1, 2, 3, 4, 5, 6]], 6, 3) == pytest.approx(wanted)


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_every_range_holds_zero_and_has_a_width(name: str, symmetric: bool, values) -> None:
    observer = get_observer(name, symmetric=symmetric)
    for part in (values, -values, values[values > 1], np.zeros(9), np.full(9, 1e-6)):
        low, high = observer.choose(see(part))
        assert low <= 0 <= high and high - low >= LEAST_WIDTH
        assert not symmetric or low == -high or high - low == LEAST_WIDTH


def test_an_unknown_observer_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"unknown observer 'percentil'\. Did you mean 'percentile'"
    ):
        get_observer("percentil")
