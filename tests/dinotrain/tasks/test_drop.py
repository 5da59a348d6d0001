"""What a smaller artifact loses, per task, against values found by hand."""

import numpy as np
import pytest

from dinotrain.tasks import TABLE, get_task


def test_eyelid_loses_its_largest_difference() -> None:
    expected = {"mrd1_mm": np.array([4.0, 3.0]), "lf_mm": np.array([12.0, 9.0])}
    actual = {"mrd1_mm": np.array([4.0, 2.9]), "lf_mm": np.array([12.25, 9.0])}
    assert get_task("eyelid").drop(expected, actual) == 0.25
    # Labels do not come into it.
    assert get_task("eyelid").drop(expected, actual, np.zeros((2, 3))) == 0.25
    assert get_task("eyelid").drop(expected, expected) == 0


def answers(*classes: int) -> dict[str, np.ndarray]:
    return {"probabilities": np.eye(3)[list(classes)]}


def test_classes_lose_accuracy_where_there_are_labels() -> None:
    task, true = get_task("classify"), np.array([[0], [1], [2], [2]])
    exact, worse = answers(0, 1, 2, 1), answers(0, 0, 2, 1)
    assert task.drop(exact, worse, true) == 0.25
    # A wrong answer may change, and a gain is no loss.
    assert task.drop(exact, answers(0, 1, 2, 0), true) == 0
    assert task.drop(worse, exact, true) == 0
    assert task.drop(exact, answers(0, 1, 2, 0)) == 0.25
    # A budget of 0.01 allows it: 0.755 - 0.745 is a little more.
    right = [0] * 151 + [1] * 49
    fewer = [0] * 149 + [1] * 51
    assert task.drop(answers(*right), answers(*fewer), np.zeros((200, 1))) == 0.01


def test_masks_lose_mean_iou() -> None:
    task = get_task("segment")
    left = np.array([[[0, 0, 1, 1]]])
    right = np.array([[[0, 1, 1, 1]]])
    # Class 0 overlaps by 1 of 2, class 1 by 2 of 3.
    lost = 1 - (1 / 2 + 2 / 3) / 2
    assert task.drop({"class_map": left}, {"class_map": right}) == pytest.approx(lost)
    assert task.drop({"class_map": left}, {"class_map": left}) == 0
    assert task.drop({"class_map": left}, {"class_map": right}, left) == pytest.approx(lost)
    assert task.drop({"class_map": right}, {"class_map": left}, left) == 0
    # The second pixel, in which the two differ, has no label.
    unknown = np.array([[[0, 255, 1, 1]]])
    assert task.drop({"class_map": left}, {"class_map": right}, unknown) == 0


def test_each_task_names_the_budget_of_its_own() -> None:
    options = {get_task(name).drop_option for name in TABLE}
    assert options == {"max-error-mm", "max-top1-drop", "max-miou-drop"}
