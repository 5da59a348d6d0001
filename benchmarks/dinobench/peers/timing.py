"""Interleaved timing and what is said about it: medians, ratios of medians, and their intervals."""

import random
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Protocol

import msgspec
import numpy as np

from dinobench.peers.worker import Turn

RUNS_PER_TURN = 3
RESAMPLES = 2000
SEED = 20260202
COVERAGE = 0.95


class Timed(Protocol):
    """Anything that takes turns."""

    def turn(self, runs: int) -> Turn:
        """Run once untimed, then ``runs`` times."""
        ...


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """One median over another, with a bootstrap interval."""

    value: float
    low: float
    high: float


def interleave(
    workers: Mapping[str, Timed], runs: int, progress: Callable[[int, int], None]
) -> dict[str, list[Turn]]:
    """Let all take turns until each has at least ``runs`` timed runs.

    A turn is one untimed run and then ``RUNS_PER_TURN``: the caches are a model's own, as while a
    camera runs. Each round has an order of its own, so that nobody always follows the same one.

    Returns:
        {name: its turns}, the n-th of all taken in the same round.
    """
    rng = random.Random(SEED)
    rounds = -(-runs // RUNS_PER_TURN)
    turns: dict[str, list[Turn]] = {name: [] for name in workers}
    for done in range(rounds):
        for name in rng.sample(sorted(workers), len(workers)):
            turns[name].append(workers[name].turn(RUNS_PER_TURN))
        progress(done + 1, rounds)
    return turns


def wall_median(turns: Sequence[Turn]) -> float:
    """Median wall time of all runs, in seconds."""
    return median(s for turn in turns for s in turn.wall_s)


def cpu_median(turns: Sequence[Turn]) -> float:
    """Median CPU time of all runs, in seconds."""
    return median(s for turn in turns for s in turn.cpu_s)


def ratio(above: Sequence[Turn], below: Sequence[Turn]) -> Ratio:
    """Compare two candidates of one interleaved run by wall time.

    Whole rounds are resampled, both candidates' together: runs of one turn share what the machine
    did meanwhile, and so, less, do turns of one round.

    Raises:
        ValueError: they did not take turns in the same rounds.
    """
    if len(above) != len(below) or not above:
        raise ValueError(f"{len(above)} turns against {len(below)}; both need the same, not none")
    a = np.array([turn.wall_s for turn in above])
    b = np.array([turn.wall_s for turn in below])
    rng = np.random.default_rng(SEED)
    rows = rng.integers(0, len(a), (RESAMPLES, len(a)))
    found = np.median(a[rows].reshape(RESAMPLES, -1), axis=1) / np.median(
        b[rows].reshape(RESAMPLES, -1), axis=1
    )
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(found, (tail, 1 - tail))
    return Ratio(value=float(np.median(a) / np.median(b)), low=float(low), high=float(high))
