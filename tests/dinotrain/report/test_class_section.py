"""The section of classes, on rendered gazes."""

import numpy as np
import pytest

from dinotrain.data.synthetic.gazes import GAZES, render_gaze
from dinotrain.errors import ShapeError
from dinotrain.metrics.classification import evaluate_classes
from dinotrain.report.class_section import MOST_CLASSES, class_section
from dinotrain.report.page import Report, Section, render_page


def load(index):
    return {"image": render_gaze(0, index % 3, 64)[0]}


def section(p, y, classes=GAZES) -> Section:
    metrics = evaluate_classes(p, y, 0, tuple(classes))
    return class_section(p, y, classes, [f"p{i}" for i in range(len(y))], load, metrics)


def sure(guesses, classes=3, by=0.8) -> np.ndarray:
    p = np.full((len(guesses), classes), (1 - by) / (classes - 1))
    p[np.arange(len(guesses)), guesses] = by
    return p


def test_the_model_stands_beside_the_commonest_class():
    part = section(sure([0, 1, 2, 1]), np.array([0, 1, 2, 2.0]))
    rows = part.tables[0].rows
    assert rows[0][:2] == ["model", "75.0 %"]
    assert rows[1][:2] == ["always primary", "25.0 %"]
    assert list(part.tables[0].quiet) == [1]


def test_classes_have_recall_and_precision_and_empty_ones_a_dash():
    table = section(sure([0, 1, 1, 1]), np.array([0, 1, 0, 0.0])).tables[1]
    assert list(table.rows[0]) == ["primary", "3", "1", "33.3 %", "100.0 %"]
    assert list(table.rows[1]) == ["up", "1", "3", "100.0 %", "33.3 %"]
    assert list(table.rows[2]) == ["down", "0", "0", "–", "–"]
    assert list(table.quiet) == [2]
    assert "1 of 3 have no sample" in table.caption


def test_the_surest_mistakes_come_first():
    p, y = sure([0, 1, 2, 1]), np.array([0, 1, 0, np.nan])
    p[1] = [0.05, 0.05, 0.9]
    part = section(p, y)
    captions = [picture.caption for picture in part.figures[1].pictures]
    assert captions == [
        "p1\npredicted (90.0 %): down\ntrue: up",
        "p2\npredicted (80.0 %): down\ntrue: primary",
    ]
    assert [list(row) for row in part.tables[2].rows] == [
        ["primary", "down", "1", "50.0 %"],
        ["up", "down", "1", "100.0 %"],
    ]


def test_without_mistakes_the_least_sure_answers_are_shown():
    p = sure([0, 1, 2])
    p[1] = [0.3, 0.4, 0.3]
    part = section(p, np.array([0, 1, 2.0]))
    assert part.figures[1].caption.startswith("No mistakes")
    assert part.figures[1].pictures[0].caption.startswith("p1\n")
    assert len(part.tables) == 2


def test_of_many_classes_the_worst_are_listed():
    count = MOST_CLASSES + 40
    y = np.arange(count - 1, dtype=float)
    guesses = y.astype(int)
    guesses[77] = 3
    table = section(sure(guesses, count), y, [f"class {i}" for i in range(count)]).tables[1]
    assert len(table.rows) == MOST_CLASSES
    assert table.rows[0][0] == "class 77"
    assert f"class {count - 1}" not in [row[0] for row in table.rows]


def test_hostile_names_are_text(read_page):
    names = ["<script>alert(1)</script>", "\u202e</svg>\x00", "$x^{2$", "a" * 400]
    part = section(sure([1, 1, 2, 0], 4), np.array([0, 1, 2, 3.0]), names)
    page = read_page(render_page(Report(title="t", sections=[part])))
    assert page.problems == []
    assert names[0] in page.texts


def test_without_labels_it_says_so():
    part = section(sure([0, 1]), np.full(2, np.nan))
    assert "No sample has a label" in part.text and not part.tables


def test_what_does_not_fit_is_refused():
    with pytest.raises(ShapeError, match=r"\(2, 3\); \(2, 2\) is needed"):
        class_section(sure([0, 1]), np.zeros(2), ["a", "b"], ["x", "y"], load, {"n": 2})
