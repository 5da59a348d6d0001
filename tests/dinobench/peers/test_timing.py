"""Interleaving, ratios and their intervals, on workers whose times are given."""

import numpy as np
import pytest

from dinobench.peers.timing import RUNS_PER_TURN, interleave, ratio, wall_median
from dinobench.peers.worker import Turn


def turn(*wall_s: float) -> Turn:
    return Turn(wall_s=wall_s, cpu_s=tuple(s / 2 for s in wall_s))


class Clock:
    """A worker of a fixed speed that writes down when it is asked."""

    def __init__(self, name: str, asked: list[str]) -> None:
        self.name, self.asked = name, asked

    def turn(self, runs: int) -> Turn:
        self.asked.append(self.name)
        return turn(*[0.1] * runs)


def test_all_take_a_turn_in_every_round_and_orders_differ() -> None:
    asked: list[str] = []
    seen: list[tuple[int, int]] = []
    names = ["a", "b", "c", "d"]
    workers = {name: Clock(name, asked) for name in names}

    turns = interleave(workers, 5 * RUNS_PER_TURN + 1, lambda done, of: seen.append((done, of)))

    rounds = [asked[i : i + 4] for i in range(0, len(asked), 4)]
    assert len(rounds) == 6  # one run more than five turns hold
    assert all(sorted(one) == names for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    assert all(len(own) == 6 and len(own[0].wall_s) == RUNS_PER_TURN for own in turns.values())
    assert seen[-1] == (6, 6)


def test_ratio_is_of_the_medians_and_lies_in_its_interval() -> None:
    rng = np.random.default_rng(0)
    above = [turn(*row) for row in 0.5 * (1 + 0.05 * rng.random((20, 3)))]
    below = [turn(*row) for row in 1.0 * (1 + 0.05 * rng.random((20, 3)))]

    found = ratio(above, below)

    assert found.value == wall_median(above) / wall_median(below)
    assert found.low <= found.value <= found.high
    assert found.low < 0.5 < found.high + 0.02
    assert found == ratio(above, below)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(40):
        a, b = (m * rng.lognormal(0, 0.1, (12, 3)) for m in (0.8, 1.0))
        found = ratio([turn(*row) for row in a], [turn(*row) for row in b])
        held += found.low <= 0.8 <= found.high
    # 95 % of 40 is 38; bootstrapped medians of few rounds are known to fall a little short.
    assert held >= 33


def test_a_load_on_one_round_of_both_moves_nothing() -> None:
    calm = [turn(1.0, 1.0, 1.0)] * 9
    loaded = [*calm, turn(9.0, 9.0, 9.0)]
    found = ratio(loaded, loaded)
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("below", [[], [turn(1.0)]], ids=["none", "fewer"])
def test_turns_of_other_rounds_are_refused(below) -> None:
    with pytest.raises(ValueError, match="both need the same"):
        ratio([turn(1.0), turn(1.0)], below)
