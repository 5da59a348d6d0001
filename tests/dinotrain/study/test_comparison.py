"""Figures over seeds against SciPy, NumPy and values worked out by hand."""

import numpy as np
import pytest
from scipy import stats

from dinotrain.errors import ShapeError
from dinotrain.study.comparison import compare, spread, steadiness


def test_spread_leaves_out_runs_without_a_figure():
    found = spread([1.0, None, 3.0])
    assert (found.mean, found.std, found.seeds) == (2.0, np.sqrt(2.0), 2)
    assert spread([1.0]).std is None
    assert spread([None]).mean is None


def test_the_difference_is_that_of_the_paired_test():
    rng = np.random.default_rng(0)
    base = rng.normal(size=6)
    own = base + rng.normal(0.3, 0.2, size=6)
    found = compare(own.tolist(), base.tolist())
    wanted = stats.ttest_rel(own, base)
    # 2.571: the 97.5 % point of Student's t with 5 degrees of freedom, from a printed table.
    half = 2.571 * (own - base).std(ddof=1) / np.sqrt(6)
    assert found.p == pytest.approx(wanted.pvalue)
    assert found.mean == pytest.approx((own - base).mean())
    assert (found.low, found.high) == pytest.approx(
        (found.mean - half, found.mean + half), rel=1e-3
    )
    # What an unpaired test cannot see.
    assert found.p < 0.05 < stats.ttest_ind(own, base).pvalue


@pytest.mark.parametrize("values", [[1.0], [1.0, 2.0], [None, 2.0, None]])
def test_too_few_or_equal_differences_have_no_interval(values):
    base = [0.0 if value is None else value - 0.5 for value in values]
    found = compare(values, base)
    assert found.mean == 0.5
    assert (found.low, found.high, found.p) == (None, None, None)


def test_pairs_must_be_pairs():
    with pytest.raises(ShapeError, match="cannot be paired"):
        compare([1.0], [1.0, 2.0])


def test_the_mean_of_five_has_a_fifth_of_the_variance():
    rng = np.random.default_rng(0)
    members = rng.normal(size=(5, 40, 300))
    found = steadiness(members.mean(axis=0), members[0])
    # 40 seeds × 300 samples: the ratio is known to 2 % or so.
    assert found.change == pytest.approx(-0.8, abs=0.02)
    assert found.std == pytest.approx(1 / np.sqrt(5), abs=0.02)
    assert found.low < found.change < found.high


def test_one_seed_that_makes_the_difference_is_seen():
    base = np.array([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    own = base.copy()
    own[3] = 9.0
    found = steadiness(own, base)
    # Without the fourth seed the two are the same.
    assert found.low == pytest.approx(0.0)
    assert found.high > 10


def test_samples_without_a_value_do_not_count():
    base = np.array([[0.0, np.nan], [2.0, 1.0]])
    found = steadiness(base, base)
    assert found.std == pytest.approx(np.sqrt(2.0))
    assert found.change == 0.0
    assert steadiness(base[:1], base[:1]).std is None
