"""Figures of a classifier, against hand values and plain formulas."""

import numpy as np
import pytest

from dinotrain.errors import ShapeError
from dinotrain.metrics.classification import calibration_error, evaluate_classes

NAMES = ("a", "b", "c")


def one_hot(classes, sure=1.0):
    rest = (1 - sure) / 2
    return np.array([[sure if i == c else rest for i in range(3)] for c in classes])


def test_by_hand():
    true = np.array([0, 0, 0, 1, 1, 2.0])
    found = evaluate_classes(one_hot([0, 0, 1, 1, 1, 0], 0.8), true, 0, NAMES)
    assert found["n"] == 6
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    # F1: a 2·2/(3+3), b 2·2/(2+3), c 0.
    assert found["macro_f1"] == pytest.approx((4 / 6 + 4 / 5 + 0) / 3)
    assert found["log_loss"] == pytest.approx(-(4 * np.log(0.8) + 2 * np.log(0.1)) / 6)
    assert found["calibration_error"] == pytest.approx(0.8 - 4 / 6)
    assert found["confusion"] == [[2, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert found["recall"] == {"a": pytest.approx(2 / 3), "b": 1.0, "c": 0.0}
    assert found["majority_class"]["name"] == "a"
    assert found["majority_class"]["accuracy"] == pytest.approx(0.5)
    assert found["majority_class"]["balanced_accuracy"] == pytest.approx(1 / 3)
    assert "top_5_accuracy" not in found


def test_missing_labels_and_classes():
    true = np.array([np.nan, 1.0, np.nan])
    found = evaluate_classes(one_hot([0, 1, 2]), true, 0, NAMES)
    assert found["n"] == 1
    assert found["accuracy"] == found["balanced_accuracy"] == found["macro_f1"] == 1.0
    assert found["recall"] == {"a": None, "b": 1.0, "c": None}
    assert evaluate_classes(one_hot([0]), np.array([np.nan]), 0, NAMES) == {"n": 0}


def test_top_five():
    rng = np.random.default_rng(0)
    p, names = rng.dirichlet(np.ones(9), 50), tuple("abcdefghi")
    true = rng.integers(0, 9, 50)
    plain = np.mean([t in np.argsort(-row)[:5] for row, t in zip(p, true, strict=True)])
    assert evaluate_classes(p, true.astype(float), 0, names)["top_5_accuracy"] == plain


def test_a_wrong_class_that_is_certain_costs_no_infinity():
    found = evaluate_classes(one_hot([1]), np.array([0.0]), 0, NAMES)
    assert found["log_loss"] == pytest.approx(-np.log(1e-12))


def test_calibration_against_a_plain_loop():
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.ones(4), 300)
    true = rng.integers(0, 4, 300)
    total = 0.0
    for low in np.arange(15) / 15:
        rows = [i for i in range(300) if low <= p[i].max() < low + 1 / 15]
        if rows:
            confidence = np.mean([p[i].max() for i in rows])
            accuracy = np.mean([p[i].argmax() == true[i] for i in rows])
            total += len(rows) / 300 * abs(confidence - accuracy)
    assert calibration_error(p, true) == pytest.approx(total)
    # Overconfidence is seen.
    assert calibration_error(one_hot([0] * 10), np.arange(10) % 2) == pytest.approx(0.5)


@pytest.mark.parametrize("shapes", [((3, 2), (3,)), ((3, 3), (2,)), ((3, 3), (3, 1))])
def test_shapes_that_do_not_fit(shapes):
    with pytest.raises(ShapeError):
        evaluate_classes(np.zeros(shapes[0]), np.zeros(shapes[1]), 0, NAMES)
