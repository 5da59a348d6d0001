"""The confusion matrix, read back cell by cell."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from dinotrain.errors import ShapeError
from dinotrain.report.class_plots import MOST_LABELLED, confusion_matrix


def placed(svg: bytes) -> dict[str, tuple[float, float]]:
    """{text: (x, y)} of texts that occur once; y downwards."""
    found: dict[str, list[tuple[float, float]]] = {}
    for element in ElementTree.fromstring(svg).iter():
        if not element.tag.endswith("text"):
            continue
        moved = re.search(r"translate\(([\d.]+) ([\d.]+)\)", element.get("transform", ""))
        x, y = moved.groups() if moved else (element.get("x"), element.get("y"))
        found.setdefault(element.text or "", []).append((float(x), float(y)))
    return {text: places[0] for text, places in found.items() if len(places) == 1}


def test_rows_are_true_and_columns_predicted():
    counts = np.array([[11, 12, 13], [21, 22, 23], [31, 32, 33]])
    cells = placed(confusion_matrix(counts, ["a", "b", "c"]).data)
    for row in range(3):
        heights = {round(cells[str(counts[row, column])][1], 3) for column in range(3)}
        places = {round(cells[str(counts[other, row])][0], 3) for other in range(3)}
        assert len(heights) == len(places) == 1
    assert cells["11"][1] < cells["21"][1] < cells["31"][1]
    assert cells["11"][0] < cells["12"][0] < cells["13"][0]
    # A matrix given the wrong way round is seen.
    turned = placed(confusion_matrix(counts.T, ["a", "b", "c"]).data)
    assert turned["12"][1] > turned["11"][1]


def test_shares_are_of_the_row():
    cells = placed(confusion_matrix([[3, 1], [0, 400]], ["a", "b"]).data)
    assert {"3", "75 %", "1", "25 %", "400", "100 %"} <= set(cells)
    assert "0 %" not in cells
    assert "<1 %" in placed(confusion_matrix([[999, 1], [0, 1]], ["a", "b"]).data)


@pytest.mark.parametrize("classes", [1, 2, 5, 12, 30, MOST_LABELLED, MOST_LABELLED + 1, 200])
def test_any_number_of_classes(classes):
    counts = np.eye(classes, dtype=int) * 123456789 + 1
    figure = confusion_matrix(counts, [f"a class called {i}" for i in range(classes)])
    root = ElementTree.fromstring(figure.data)
    labels = [e for e in root.iter() if (e.text or "").startswith("a class")]
    assert len(labels) == (2 * classes if classes <= MOST_LABELLED else 0)
    # However many classes, it is no burden to a page.
    assert len(figure.data) < 4_000_000


def test_thirty_classes_fit_across_the_page():
    figure = confusion_matrix(np.ones((30, 30), int), [f"quite a long name {i}" for i in range(30)])
    width = float(ElementTree.fromstring(figure.data).get("width").removesuffix("pt")) * 96 / 72
    # 72 rem less its padding.
    assert width <= 72 * 16 - 40


def test_large_counts_are_shortened():
    cells = placed(confusion_matrix([[45_678_901, 1], [2, 3]], ["a", "b"]).data)
    assert "45.7M" in cells


def test_nothing_and_nonsense():
    assert b"no labelled samples" in confusion_matrix(np.zeros((2, 2)), ["a", "b"]).data
    with pytest.raises(ShapeError, match=r"is \(2, 3\); \(2, 2\)"):
        confusion_matrix(np.ones((2, 3)), ["a", "b"])
    with pytest.raises(ShapeError, match="needs classes"):
        confusion_matrix(np.ones((0, 0)), [])
