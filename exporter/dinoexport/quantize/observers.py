"""Observers: from what a tensor was seen to hold to the range that its integers cover.

All read one histogram that widens while pictures come, so that no tensor is kept.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
from numpy.typing import NDArray

from dinoexport.quantize.layers import Range
from dinotrain.errors import unknown_name

BINS = 8192
"""Outliers of 100 times the rest leave 80 bins to it; a multiple of 4, so that halves can merge."""
LEVELS = 256
"""Of 8 bits, which ranges are chosen for."""
PERCENTILE = 99.99
LEAST_WIDTH = 2.0**-10
"""Of a range: a tensor that is always zero still has a scale."""
_MERGED = 2048
"""Bins of magnitudes that the entropy is taken over, as TensorRT does."""
_CUTS = 64
"""Steps between the largest value and nothing that the squared error is tried at."""


class Histogram:
    """Counts of values in equal bins around zero; what does not fit doubles the bins' width.

    Args:
        minimum: seen before, if nothing but the ends is asked.
        maximum: the same.

    Attributes:
        counts: (BINS,) int64, from -limit to limit.
        limit: a power of two above every magnitude seen; 0 before anything but zeros was.
        minimum: exact.
        maximum: exact.
    """

    def __init__(self, minimum: float = np.inf, maximum: float = -np.inf) -> None:
        self.counts: NDArray[np.int64] = np.zeros(BINS, np.int64)
        self.limit = 0.0
        self.minimum = minimum
        self.maximum = maximum

    @property
    def total(self) -> int:
        """Values seen."""
        return int(self.counts.sum())

    @property
    def centres(self) -> NDArray[np.float64]:
        """(BINS,) middle of each bin."""
        width = 2 * self.limit / BINS
        return np.add((np.arange(BINS) + 0.5) * width, -self.limit, dtype=np.float64)

    def add(self, values: NDArray[np.float32]) -> None:
        """Count finite values of any shape."""
        low, high = float(values.min()), float(values.max())
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        self._widen(max(-low, high))
        flat = values.reshape(-1)
        if self.limit == 0:
            self.counts[BINS // 2] += flat.size
            return
        # In place and in float32: four times as fast, and off by a thousandth of a bin.
        places = flat * np.float32(BINS / (2 * self.limit))
        places += BINS // 2
        np.clip(places, 0, BINS - 1, out=places)
        self.counts += np.bincount(places.astype(np.int64), minlength=BINS)

    def _widen(self, peak: float) -> None:
        if peak <= self.limit:
            return
        wanted = 2.0 ** np.ceil(np.log2(peak))
        if self.limit == 0:
            # All that was seen is zero and stays in the middle.
            self.limit = wanted
            return
        while self.limit < wanted:
            quarter = BINS // 4
            pairs = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.pad(pairs, quarter)
            self.limit *= 2


@dataclass(frozen=True)
class Observer(ABC):
    """Chooses a range. Subclasses are final.

    Args:
        symmetric: the range reaches as far below zero as above.
    """

    symmetric: bool = False

    name: ClassVar[str] = ""
    counts: ClassVar[bool] = True
    """Whether more than the two ends is asked of a histogram."""

    @property
    def label(self) -> str:
        """Name and kind, as records have it."""
        return f"{self.name}, symmetric" if self.symmetric else self.name

    def choose(self, seen: Histogram) -> Range:
        """Return the range to clip to; it holds zero, so that zero is exact, and is not empty."""
        low, high = self._choose(seen)
        low, high = min(low, 0.0), max(high, 0.0)
        if self.symmetric:
            high = max(-low, high)
            low = -high
        if high - low < LEAST_WIDTH:
            high = low + LEAST_WIDTH
        return float(low), float(high)

    @abstractmethod
    def _choose(self, seen: Histogram) -> Range: ...


@final
@dataclass(frozen=True)
class MinMax(Observer):
    """Everything that was seen: nothing is clipped, and one outlier sets the step."""

    name = "min-max"
    counts = False

    def _choose(self, seen: Histogram) -> Range:
        return seen.minimum, seen.maximum


@final
@dataclass(frozen=True)
class Percentile(Observer):
    """All but a share of the values, half of it cut off at each end; of magnitudes if symmetric."""

    name = "percentile"

    def _choose(self, seen: Histogram) -> Range:
        share = 1 - PERCENTILE / 100
        centres = seen.centres
        if self.symmetric:
            sizes = np.abs(centres)
            order = np.argsort(sizes, kind="stable")
            peak = _quantile(sizes[order], seen.counts[order], 1 - share)
            return -peak, min(peak, max(-seen.minimum, seen.maximum))
        low = _quantile(centres, seen.counts, share / 2)
        high = _quantile(centres, seen.counts, 1 - share / 2)
        return max(low, seen.minimum), min(high, seen.maximum)


@final
@dataclass(frozen=True)
class SquaredError(Observer):
    """The least expected squared error: rounding within the range, step²/12, against clipping."""

    name = "mse"

    def _choose(self, seen: Histogram) -> Range:
        low, high = min(seen.minimum, 0.0), max(seen.maximum, 0.0)
        if self.symmetric:
            peak = max(-low, high)
            cuts = peak * np.arange(1, _CUTS + 1) / _CUTS
            errors = [squared_error(seen, -cut, cut) for cut in cuts]
            best = float(cuts[int(np.argmin(errors))])
            return -best, best
        # The two ends only meet in the step: a few turns settle them.
        for _ in range(3):
            highs = max(seen.maximum, 0.0) * np.arange(_CUTS + 1) / _CUTS
            high = float(min(highs, key=lambda end: squared_error(seen, low, end)))
            lows = min(seen.minimum, 0.0) * np.arange(_CUTS + 1) / _CUTS
            low = float(min(lows, key=lambda end: squared_error(seen, end, high)))
        return low, high


@final
@dataclass(frozen=True)
class Entropy(Observer):
    """The cut of magnitudes whose 128 levels tell least about what was seen (KL divergence).

    Source: Migacz, "8-bit Inference with TensorRT" (2017).
    """

    name = "entropy"

    def _choose(self, seen: Histogram) -> Range:
        half = BINS // 2
        sizes = seen.counts[half:] + seen.counts[:half][::-1]
        merged = sizes.reshape(_MERGED, -1).sum(axis=1).astype(np.float64)
        used = int(np.flatnonzero(merged)[-1]) + 1
        levels = LEVELS // 2
        step = max((used - levels) // 64, 1)
        cuts = [*range(levels, used, step), used] if used > levels else [used]
        best = min(cuts, key=lambda cut: divergence(merged[:used], cut, levels))
        peak = seen.limit * best / _MERGED
        return max(seen.minimum, -peak), min(seen.maximum, peak)


OBSERVERS: dict[str, type[Observer]] = {
    kind.name: kind for kind in (MinMax, Percentile, SquaredError, Entropy)
}
DEFAULT_OBSERVER = MinMax.name


def get_observer(name: str, *, symmetric: bool = False) -> Observer:
    """Return an observer by name.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in OBSERVERS:
        raise unknown_name("observer", name, OBSERVERS)
    return OBSERVERS[name](symmetric=symmetric)


def squared_error(seen: Histogram, low: float, high: float) -> float:
    """Return the mean squared error of rounding what was seen to ``LEVELS`` steps in a range."""
    if high <= low:
        return float(np.inf)
    centres, counts = seen.centres, seen.counts
    beyond = centres - np.clip(centres, low, high)
    inside = counts[beyond == 0].sum()
    step = (high - low) / (LEVELS - 1)
    return float((counts * beyond**2).sum() + inside * step**2 / 12) / max(seen.total, 1)


def divergence(sizes: NDArray[np.float64], cut: int, levels: int) -> float:
    """Return the KL divergence of magnitudes, clipped behind ``cut`` bins, from their levels.

    Args:
        sizes: (bins,) counts of magnitudes from zero on.
        cut: bins that are kept; the others are counted in the last of them.
        levels: that the kept bins are merged into.
    """
    kept = sizes[:cut].copy()
    clipped = kept.copy()
    clipped[-1] += sizes[cut:].sum()
    places = np.arange(cut) * levels // cut
    filled = kept > 0
    # Each level's count is spread over those of its bins that hold something.
    sums = np.bincount(places, kept, levels)
    shares = np.bincount(places, filled, levels)
    told = np.where(filled, (sums / np.maximum(shares, 1))[places], 0.0)
    p, q = clipped / clipped.sum(), told / max(told.sum(), 1e-30)
    both = p > 0
    return float((p[both] * np.log(p[both] / np.maximum(q[both], 1e-12))).sum())


def _quantile(values: NDArray[np.float64], counts: NDArray[np.int64], share: float) -> float:
    """Return the value below which a share of the counts lies; ``values`` are sorted."""
    running = np.cumsum(counts)
    return float(values[min(int(np.searchsorted(running, share * running[-1])), len(values) - 1)])
