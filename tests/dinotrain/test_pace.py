"""Throughput beside a progress bar, on a clock of its own."""

import pytest

from dinotrain.pace import Pace


@pytest.mark.parametrize(
    ("seconds", "count", "text"),
    [
        (2.0, 5, "2.5 pictures/s"),
        (8.0, 1, "0.125 pictures/s"),
        (0.5, 617, "1,234 pictures/s"),
        (0.0, 3, ""),
        (1.0, 0, ""),
    ],
)
def test_units_per_second(seconds, count, text):
    times = iter([100.0, 100.0 + seconds])
    assert Pace("pictures", lambda: next(times)).note(count) == text
