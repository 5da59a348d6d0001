"""Intervals as a part of a model's configuration."""

import msgspec
import pytest

from dinotrain.errors import UsageError
from dinotrain.intervals import Intervals

GOOD = {"method": "scaled", "coverage": 0.9, "factors": (1.5, 0.1), "subjects": (20, 19)}


def test_they_pass_through_json_to_the_last_bit():
    made = Intervals(**(GOOD | {"factors": (0.1 + 0.2, 1 / 3)}))
    assert msgspec.json.decode(msgspec.json.encode(made), type=Intervals) == made


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coverage": 1.0}, r"coverage 1\.0"),
        ({"coverage": float("nan")}, "coverage nan"),
        ({"factors": (1.0,)}, "1 factors and 2 numbers of subjects"),
        ({"factors": (), "subjects": ()}, "0 factors"),
        ({"factors": (1.0, -2.0)}, r"factor -2\.0"),
        ({"factors": (1.0, float("inf"))}, "factor inf"),
        ({"factors": (float("nan"), 1.0)}, "factor nan"),
    ],
    ids=str,
)
def test_what_is_no_interval_is_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        Intervals(**(GOOD | fields))


def test_a_foreign_method_is_refused():
    raw = msgspec.json.encode(GOOD | {"method": "guess"})
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(raw, type=Intervals)
