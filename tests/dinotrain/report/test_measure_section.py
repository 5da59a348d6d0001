"""The section of measurements, on rendered eyes."""

from math import inf, nan

import numpy as np
import pytest

from dinotrain.data.synthetic.eyes import render_eye
from dinotrain.errors import DataError, ShapeError
from dinotrain.metrics.regression import evaluate_targets
from dinotrain.report.measure_section import measure_section
from dinotrain.report.page import Figure, Gallery, Report, Section, render_page
from dinotrain.tasks.eyelid import EyelidTask

TARGETS = EyelidTask().targets
NAMES = [target.output_name for target in TARGETS]


@pytest.fixture(scope="module")
def eyes():
    return [render_eye(0, index, 64) for index in range(12)]


@pytest.fixture(scope="module")
def true(eyes):
    values = np.array([[e.mrd1_mm, e.mrd2_mm, e.lf_mm] for e in eyes])
    values[2, 1] = nan
    return values


@pytest.fixture(scope="module")
def guess(true):
    noise = np.random.default_rng(0).normal(0, 0.3, true.shape)
    return np.where(np.isnan(true), 4, true) + noise


def section(guess, true, eyes, extra=None, load=None, **options) -> Section:
    predicted = {name: guess[:, column] for column, name in enumerate(NAMES)} | (extra or {})
    return measure_section(
        predicted,
        true,
        TARGETS,
        [f"{e.subject_id}/{e.eye}" for e in eyes],
        load or (lambda index: dict(eyes[index].images)),
        evaluate_targets(np.nan_to_num(guess, posinf=9), true, true, TARGETS),
        **options,
    )


def galleries(part: Section) -> list[Gallery]:
    return [figure for figure in part.figures if isinstance(figure, Gallery)]


def captions(part: Section) -> str:
    return " ".join(f.caption for f in part.figures if isinstance(f, Figure))


def test_each_target_stands_beside_the_mean_predictor(guess, true, eyes):
    table = section(guess, true, eyes).tables[0]
    assert [row[0] for row in table.rows] == [name for name in NAMES for _ in range(2)]
    assert list(table.quiet) == [1, 3, 5]
    mae = table.columns.index("MAE")
    for column in range(3):
        known = ~np.isnan(true[:, column])
        y, p = true[known, column], guess[known, column]
        model, base = table.rows[2 * column], table.rows[2 * column + 1]
        assert model[mae] == f"{np.abs(p - y).mean():.3f}"
        assert base[mae] == f"{np.abs(y.mean() - y).mean():.3f}"
        assert base[1] == f"always {y.mean():.2f} mm"
        assert model[2] == str(known.sum())


def test_the_worst_cases_come_first_and_show_their_pictures(guess, true, eyes):
    wrong = guess.copy()
    wrong[7, 0], wrong[4, 0] = true[7, 0] - 9, inf
    pictures = galleries(section(wrong, true, eyes))[0].pictures
    names = [picture.caption.split("\n")[0] for picture in pictures]
    assert names[:2] == [f"{eyes[i].subject_id}/{eyes[i].eye}" for i in (4, 7)]
    assert "off by −9.00 mm" in pictures[1].caption
    assert pictures[0].width_px > 2 * 176  # three gazes


def test_unlabelled_rows_are_no_cases(guess, true, eyes):
    unlabelled = true.copy()
    unlabelled[:, 2] = nan
    part = section(guess, unlabelled, eyes)
    assert len(galleries(part)) == 2
    assert render_page(Report(title="t", sections=[part]))


def test_stated_uncertainty_is_judged(guess, true, eyes):
    std = {target.std_name: np.full(12, 0.3) for target in TARGETS}
    part = section(guess, true, eyes, std)
    assert [row[0] for row in part.tables[1].rows] == NAMES
    assert part.tables[1].rows[0][1] == "0.300"
    assert "Coverage of the stated intervals" in captions(part)
    assert len(section(guess, true, eyes).tables) == 1


def test_intervals_are_drawn_where_there_are_any(guess, true, eyes):
    ends = {"lf_low_mm": guess[:, 2] - 9, "lf_high_mm": guess[:, 2] + 9}
    part = section(guess, true, eyes, ends, stated_coverage=0.9)
    assert "lf_mm: intervals around the true value; 100.0 % of 12 hold, stated 90 %" in captions(
        part
    )
    assert "mrd1_mm: intervals" not in captions(part)


def test_a_picture_that_is_gone_costs_no_report(guess, true, eyes):
    def lost(index):
        raise DataError("no such picture")

    part = section(guess, true, eyes, load=lost)
    assert "cannot be read" in galleries(part)[0].pictures[0].caption


def test_what_does_not_fit_is_refused(guess, true, eyes):
    with pytest.raises(ShapeError, match=r"11 rows and there are 12 names"):
        section(guess[:11], true[:11], eyes)
    with pytest.raises(ShapeError, match=r"lf_mm is missing; \(12,\)"):
        measure_section(dict.fromkeys(NAMES[:2], guess[:, 0]), true, TARGETS, [""] * 12, dict, {})
