"""Metrics against scikit-learn, SciPy and worked examples."""

import json

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

from dinotrain.errors import ShapeError
from dinotrain.metrics.regression import evaluate_targets, icc_2_1
from dinotrain.tasks.base import TargetSpec

TARGETS = (TargetSpec("a", "mm", 0.0, 16.0, ""), TargetSpec("b", "mm", 0.0, 16.0, ""))


@pytest.fixture
def values():
    rng = np.random.default_rng(0)
    true = rng.normal(5, 2, (40, 2))
    predicted = true + rng.normal(0.3, 0.7, (40, 2))
    true[::3, 1] = np.nan
    return predicted, true


def test_against_scikit_learn_and_scipy(values):
    predicted, true = values
    reference = np.array([[4.0, 6.0], [6.0, np.nan]])
    found = evaluate_targets(predicted, true, reference, TARGETS)
    assert list(found) == ["a_mm", "b_mm"]
    for column, name in enumerate(found):
        keep = ~np.isnan(true[:, column])
        y, p, row = true[keep, column], predicted[keep, column], found[name]
        assert row["n"] == keep.sum()
        assert row["mse_mm2"] == pytest.approx(mean_squared_error(y, p))
        assert row["rmse_mm"] == pytest.approx(mean_squared_error(y, p) ** 0.5)
        assert row["mae_mm"] == pytest.approx(mean_absolute_error(y, p))
        assert row["r2"] == pytest.approx(r2_score(y, p))
        assert row["pearson_r"] == pytest.approx(stats.pearsonr(y, p)[0])
        assert row["bias_mm"] == pytest.approx(np.mean(p - y))
        sd = np.sqrt(np.sum((p - y - np.mean(p - y)) ** 2) / (len(y) - 1))
        assert row["loa_low_mm"] == pytest.approx(np.mean(p - y) - 1.96 * sd)
        assert row["loa_high_mm"] == pytest.approx(np.mean(p - y) + 1.96 * sd)
        close = [100 * sum(abs(e) <= limit for e in p - y) / len(y) for limit in (0.5, 1.0)]
        assert row["within_0_5_mm_percent"] == pytest.approx(close[0])
        assert row["within_1_0_mm_percent"] == pytest.approx(close[1])
        mean = [5.0, 6.0][column]
        base = row["mean_predictor"]
        assert base["value_mm"] == mean
        assert base["mse_mm2"] == pytest.approx(np.mean((y - mean) ** 2))
        assert base["mae_mm"] == pytest.approx(np.mean(np.abs(y - mean)))


def test_icc_by_hand():
    # Rows (1, 2), (3, 3), (5, 7). Means of rows 1.5, 3, 6; of columns 3, 4; grand 3.5.
    # MSR = 2·(4 + 0.25 + 6.25)/2 = 10.5; MSC = 3·(0.25 + 0.25)/1 = 1.5;
    # residuals ±0, ±0.5, ±0.5: SSE = 2·(0 + 0.25 + 0.25) = 1, MSE = 1/2.
    # ICC = (10.5 − 0.5)/(10.5 + 0.5 + 2·(1.5 − 0.5)/3) = 10/11.6667.
    found = icc_2_1(np.array([1.0, 3.0, 5.0]), np.array([2.0, 3.0, 7.0]))
    assert found == pytest.approx(10 / (11 + 2 / 3))


def test_icc_sees_a_shift_that_pearson_does_not():
    true = np.arange(10.0)
    shifted = true + 3
    assert stats.pearsonr(true, shifted)[0] == pytest.approx(1.0)
    assert icc_2_1(shifted, true) < 0.75
    assert icc_2_1(true, true) == pytest.approx(1.0)


def test_undefined_figures_are_none_and_the_row_is_json():
    nan = float("nan")
    true = np.array([[1.0, nan], [1.0, nan]])
    found = evaluate_targets(np.zeros((2, 2)), true, np.full((1, 2), nan), TARGETS)
    assert found["a_mm"]["r2"] is None
    assert found["a_mm"]["pearson_r"] is None
    assert found["a_mm"]["mae_mm"] == 1.0
    assert "mean_predictor" not in found["a_mm"]
    assert found["b_mm"]["n"] == 0
    assert found["b_mm"]["mae_mm"] is None
    json.dumps(found, allow_nan=False)


def test_one_label_has_an_error_and_no_spread():
    found = evaluate_targets(np.ones((1, 2)), np.zeros((1, 2)), np.zeros((1, 2)), TARGETS)["a_mm"]
    assert found["bias_mm"] == 1.0
    assert found["loa_low_mm"] is None
    assert found["icc_2_1"] is None


def test_arrays_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match="2 columns"):
        evaluate_targets(np.zeros((3, 1)), np.zeros((3, 2)), np.zeros((3, 2)), TARGETS)
    with pytest.raises(ShapeError, match="as many rows"):
        evaluate_targets(np.zeros((2, 2)), np.zeros((3, 2)), np.zeros((3, 2)), TARGETS)
