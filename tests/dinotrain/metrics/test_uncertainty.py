"""Uncertainty figures against integrals, slow loops, and simulations whose truth is known."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy import integrate, stats
from sklearn.calibration import calibration_curve

from dinotrain.errors import DataError, ShapeError, UsageError
from dinotrain.metrics.uncertainty import (
    NOMINAL,
    bit_calibration_error,
    calibration_error,
    conformal_factor,
    coverage_curve,
    evaluate_intervals,
    evaluate_uncertainty,
    gaussian_crps,
    interval_coverage,
)
from dinotrain.tasks.base import TargetSpec

NAN = float("nan")


def test_crps_by_hand():
    # At the mean: σ(2φ(0) − 1/√π) = σ(√2 − 1)/√π.
    wanted = 3 * (math.sqrt(2) - 1) / math.sqrt(math.pi)
    assert gaussian_crps(1.0, 3.0, 1.0) == pytest.approx(wanted)
    assert gaussian_crps([1.0, 2.0], [0.0, 0.0], [4.0, NAN]).tolist()[0] == 3.0
    assert math.isnan(gaussian_crps(0.0, 1.0, NAN))


@pytest.mark.parametrize(("mean", "std", "true"), [(0, 1, 0.3), (5, 0.2, 4.1), (-2, 3, 4)])
def test_crps_is_its_integral(mean, std, true):
    def gap(x):
        return (stats.norm.cdf(x, mean, std) - (x >= true)) ** 2

    ends = sorted((mean - 12 * std, true, mean + 12 * std))
    wanted = sum(integrate.quad(gap, a, b)[0] for a, b in itertools.pairwise(ends))
    assert gaussian_crps(mean, std, true) == pytest.approx(wanted, rel=1e-6)


def test_crps_is_least_for_the_true_spread():
    true = np.random.default_rng(0).normal(0, 2, 20_000)
    scores = [
        gaussian_crps(np.zeros_like(true), np.full_like(true, s), true).mean()
        for s in (1.0, 1.5, 2.0, 2.7, 4.0)
    ]
    assert np.argmin(scores) == 2


def test_coverage_by_hand():
    # The central 50 % of N(0, 1) ends at 0.6745.
    found = coverage_curve([0, 0, 0, 0], [1, 1, 1, 1], [0.6, -0.7, 0.1, NAN], [0.5])
    assert found.tolist() == pytest.approx([2 / 3])


def test_calibration_error_of_known_spreads():
    rng = np.random.default_rng(0)
    std = rng.uniform(0.5, 2, 20_000)
    true = rng.normal(3, std)
    predicted = np.full_like(true, 3)
    # 20,000 rows: standard error 0.0035 at most.
    assert calibration_error(predicted, std, true) < 0.01
    # Twice too sure: the interval of coverage p ends at half its distance.
    half = 2 * stats.norm.cdf(stats.norm.ppf((1 + np.array(NOMINAL)) / 2) / 2) - 1
    wanted = np.abs(np.array(NOMINAL) - half).mean()
    assert calibration_error(predicted, std / 2, true) == pytest.approx(wanted, abs=0.01)


def test_calibration_error_row_by_row():
    rng = np.random.default_rng(1)
    predicted, std, true = rng.normal(size=30), rng.uniform(0.2, 1, 30), rng.normal(size=30)
    true[::7] = NAN
    gaps = []
    for nominal in NOMINAL:
        inside = total = 0
        for guess, sigma, y in zip(predicted, std, true, strict=True):
            if math.isnan(y):
                continue
            low, high = stats.norm.interval(nominal, guess, sigma)
            inside, total = inside + (low <= y <= high), total + 1
        gaps.append(abs(nominal - inside / total))
    found = calibration_error(predicted, std, true)
    assert found == pytest.approx(sum(gaps) / 9)


def test_bit_calibration_by_hand():
    # Bin 0.9…: two of p 0.95 with one 1; bin 0.2…: p 0.2 and a 0. (2·|0.95 − 0.5| + 0.2) / 3.
    found = bit_calibration_error([[0.95], [0.95], [0.2]], [[1], [0], [0]])
    assert found.tolist() == pytest.approx([(2 * 0.45 + 0.2) / 3])


def test_bit_calibration_is_scikit_learns_curve():
    rng = np.random.default_rng(0)
    p = rng.uniform(size=(500, 3))
    bits = (rng.uniform(size=(500, 3)) < p**2).astype(float)
    bits[:20, 1] = NAN
    found = bit_calibration_error(p, bits)
    for column in range(3):
        kept = ~np.isnan(bits[:, column])
        guess, bit = p[kept, column], bits[kept, column]
        ones, mean = calibration_curve(bit, guess, n_bins=15)
        share = np.histogram(guess, bins=15, range=(0, 1))[0] / len(guess)
        wanted = (share[share > 0] * np.abs(ones - mean)).sum()
        assert found[column] == pytest.approx(wanted)
    # E|p − p²| over uniform p is 1/6.
    assert found[0] == pytest.approx(1 / 6, abs=0.05)


def test_bit_calibration_of_sure_and_right_bits_is_zero():
    bits = np.array([[1, 0], [0, 0], [1, NAN]])
    assert bit_calibration_error(np.nan_to_num(bits), bits).tolist() == [0.0, 0.0]
    assert np.isnan(bit_calibration_error(np.ones((2, 1)), np.full((2, 1), NAN))).all()
    with pytest.raises(ShapeError, match=r"\(2, 1\) and bits \(2, 2\)"):
        bit_calibration_error(np.ones((2, 1)), np.ones((2, 2)))


def test_conformal_by_hand():
    # Scores of subjects a to i are 1 … 9, a's largest of two rows; ⌈10 · 0.8⌉ = 8th smallest.
    subjects = [*"abcdefghi", "a", "z"]
    true = [0.5, 2, 3, 4, 5, 6, 7, 8, 9, -1.0, NAN]
    found = conformal_factor(np.zeros(11), true, subjects, 0.8)
    assert (found.factor, found.coverage, found.subjects) == (8.0, 0.8, 9)
    assert conformal_factor(np.zeros(11), true, subjects, 0.9).factor == 9.0
    # Half the standard deviation doubles the scores.
    assert conformal_factor(np.zeros(11), true, subjects, 0.8, np.full(11, 0.5)).factor == 16.0


@pytest.mark.parametrize("coverage", [0.8, 0.9])
def test_conformal_covers_new_subjects_as_promised(coverage):
    """Rows of one subject share most of their error; the model is wrong about its spread."""
    rng = np.random.default_rng(0)
    held = []
    for _ in range(1500):
        shared = rng.standard_t(3, size=(31, 1)) + 0.3 * rng.normal(size=(31, 2))
        std = rng.uniform(0.5, 1.5, size=(31, 2))
        error = shared * std
        factor = conformal_factor(
            np.zeros(60),
            error[:30].ravel(),
            np.repeat(np.arange(30), 2),
            coverage,
            std[:30].ravel(),
        ).factor
        held.append(bool((np.abs(error[30]) <= factor * std[30]).all()))
    # Between coverage and coverage + 1/31; 1500 draws have a standard error of 0.01.
    assert coverage - 0.03 <= np.mean(held) <= coverage + 1 / 31 + 0.03


def test_rows_taken_for_subjects_are_caught():
    """The planted fault: with each row as its own subject, people are covered less often."""
    rng = np.random.default_rng(1)
    by_subject, by_row = [], []
    for _ in range(400):
        error = rng.normal(size=(31, 4))
        rows, people = error[:30].ravel(), np.repeat(np.arange(30), 4)
        for held, names in ((by_subject, people), (by_row, np.arange(120))):
            factor = conformal_factor(np.zeros(120), rows, names, 0.9).factor
            held.append(np.abs(error[30]).max() <= factor)
    assert np.mean(by_subject) > 0.87
    assert np.mean(by_row) < 0.75


@pytest.mark.parametrize(("coverage", "needed"), [(0.9, 9), (0.95, 19), (0.8, 4)])
def test_too_few_subjects_are_refused(coverage, needed):
    few = np.arange(needed - 1)
    message = f"{needed - 1} labelled subjects cannot .* it needs {needed}"
    with pytest.raises(DataError, match=message):
        conformal_factor(np.zeros(needed - 1), np.ones(needed - 1), few, coverage)
    enough = np.arange(needed)
    assert conformal_factor(np.zeros(needed), enough, enough, coverage).factor == needed - 1


def test_what_calibrates_nothing_is_refused():
    with pytest.raises(UsageError, match=r"coverage is 1\.5"):
        conformal_factor([0.0], [0.0], ["a"], 1.5)
    with pytest.raises(ShapeError, match="2 subjects"):
        conformal_factor([0.0], [0.0], ["a", "b"])
    with pytest.raises(DataError, match=r"row 1 has the prediction 0\.0 ± 0\.0"):
        conformal_factor([0.0, 0.0], [1.0, 1.0], ["a", "b"], 0.5, [1.0, 0.0])
    with pytest.raises(DataError, match="row 0 has the prediction nan"):
        conformal_factor([NAN, 0.0], [1.0, 1.0], ["a", "b"], 0.5)


def test_coverage_of_intervals_by_hand():
    found = interval_coverage([0, 0, 0, 0], [2, 2, 2, 4], [1, 3, 2, NAN], ["a", "a", "b", "c"])
    assert found == {
        "n": 3,
        "subjects": 2,
        "rows_covered": pytest.approx(2 / 3),
        "subjects_covered": 0.5,
        "mean_width": 2.0,
    }
    assert interval_coverage([0], [1], [NAN], ["a"])["rows_covered"] is None
    with pytest.raises(ShapeError, match="one row each"):
        interval_coverage([0], [1], [1], ["a", "b"])


def test_the_report_has_a_row_per_target_and_is_json():
    targets = (TargetSpec("a", "mm", 0.0, 16.0, ""), TargetSpec("b", "mm", 0.0, 16.0, ""))
    rng = np.random.default_rng(0)
    predicted, std = rng.normal(size=(50, 2)), rng.uniform(0.5, 1, (50, 2))
    true = np.stack([rng.normal(predicted[:, 0], std[:, 0]), np.full(50, NAN)], axis=1)
    found = evaluate_uncertainty(predicted, std, true, targets)
    row = found["a_mm"]
    assert row["crps_mm"] == pytest.approx(
        gaussian_crps(predicted[:, 0], std[:, 0], true[:, 0]).mean()
    )
    assert row["mean_std_mm"] == pytest.approx(std[:, 0].mean())
    assert row["calibration_error"] == calibration_error(predicted[:, 0], std[:, 0], true[:, 0])
    curve = row["coverage_curve"]
    assert curve["nominal"] == list(NOMINAL)
    wanted = coverage_curve(predicted[:, 0], std[:, 0], true[:, 0])
    assert curve["empirical"] == wanted.tolist()
    assert found["b_mm"]["coverage_curve"]["empirical"] == [None] * 9
    assert found["b_mm"]["n"] == 0
    assert found["b_mm"]["crps_mm"] is None
    json.dumps(found, allow_nan=False)


def test_intervals_per_target_by_hand():
    targets = (TargetSpec("a", "mm", 0.0, 16.0, ""), TargetSpec("b", "mm", 0.0, 16.0, ""))
    low = np.array([[0.0, 0], [0, 0], [0, 0], [0, 0]])
    high = np.array([[2.0, 1], [2, 1], [2, 1], [4, 1]])
    true = np.array([[1.0, NAN], [3, NAN], [2, NAN], [NAN, NAN]])
    found = evaluate_intervals(low, high, true, targets, ["x", "x", "y", "z"])
    assert found["a_mm"] == {
        "interval_rows_covered": pytest.approx(2 / 3),
        "interval_subjects_covered": 0.5,
        "interval_width_mm": 2.0,
    }
    assert set(found["b_mm"].values()) == {None}
    nameless = evaluate_intervals(low, high, true, targets)["a_mm"]
    assert nameless == {"interval_rows_covered": pytest.approx(2 / 3), "interval_width_mm": 2.0}
    with pytest.raises(ShapeError, match="2 columns, one per target"):
        evaluate_intervals(low[:, :1], high[:, :1], true[:, :1], targets)
    with pytest.raises(ShapeError, match="3 subjects"):
        evaluate_intervals(low, high, true, targets, ["x", "y", "z"])


def test_arrays_that_do_not_fit_are_refused():
    targets = (TargetSpec("a", "mm", 0.0, 16.0, ""),)
    with pytest.raises(ShapeError, match="one shape"):
        gaussian_crps([0.0, 1.0], [1.0], [0.0])
    with pytest.raises(DataError, match=r"is -1\.0"):
        gaussian_crps([0.0], [-1.0], [0.0])
    with pytest.raises(ShapeError, match="1 columns"):
        evaluate_uncertainty(np.zeros((3, 2)), np.ones((3, 2)), np.zeros((3, 2)), targets)
