"""The page of a study: all groups, the mean predictor, and what cannot be compared."""

import re

import pytest

from dinotrain.report.text import number
from dinotrain.study.page import write_page
from dinotrain.study.plan import STUDIES
from dinotrain.study.published import comparability
from dinotrain.study.tables import closing_tables, error_table, warning


@pytest.fixture(scope="module")
def page(finished) -> str:
    return finished.page.read_text(encoding="utf-8")


def test_all_groups_and_figures_are_on_the_page(page, finished):
    for variant in finished.request.variants:
        assert variant.group in page
        assert variant.name in page
        for output in finished.outputs:
            found = finished.figure(variant, output, "mae_mm")
            assert f"{number(found.mean)} ± {number(found.std)}" in page
    assert len(re.findall(r"<svg ", page)) == len(finished.outputs)
    for output in finished.outputs:
        assert f"MAE of {output}, mm" in page
    assert "mean of the training labels" in page


def test_the_page_says_what_is_not_comparable(page):
    assert "private cohort" in page
    assert "3.41" in page
    assert "2 seeds tell little" in page


def test_the_mean_predictor_is_what_numpy_says(finished):
    train = finished.dataset.split("train").labels(["mrd1"])[:, 0]
    test = finished.dataset.split("test").labels(["mrd1"])[:, 0]
    wanted = abs(test - train.mean()).mean()
    assert finished.baseline("mrd1_mm").mean == pytest.approx(wanted)
    assert error_table(finished).rows[-1][2] == number(wanted)


def test_differences_are_those_to_the_first(finished):
    first, second = finished.request.variants
    assert finished.difference(first, "lf_mm") is None
    found = finished.difference(second, "lf_mm")
    pairs = zip(
        finished.values(second, "lf_mm", "mae_mm"),
        finished.values(first, "lf_mm", "mae_mm"),
        strict=True,
    )
    assert found.mean == pytest.approx(sum(a - b for a, b in pairs) / 2)


def test_seeds_with_splits_of_their_own_are_told(finished, tmp_path):
    """A fault planted: one run was judged on other samples."""
    import msgspec

    from dinotrain.study.tables import StudyResult

    records = list(finished.records)
    records[0] = msgspec.structs.replace(records[0], fingerprint="other")
    result = StudyResult(finished.request, records, finished.dataset, tmp_path / "page.html")
    assert "drawn anew with each seed" in warning(result)
    assert result.steadiness(finished.request.variants[1], "lf_mm") is None
    assert len(closing_tables(result)) == len(closing_tables(finished)) - 1
    write_page(result)


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_what_is_said_of_the_paper(study):
    text = comparability(study, "tiny", "12 bars").text
    assert study.backbone in text
    assert study.claim in text
    assert "12 bars" in text
