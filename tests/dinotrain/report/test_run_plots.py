"""Plots of runs, read back from their SVG and captions."""

import math
from xml.etree import ElementTree

import numpy as np
import pytest

from dinotrain.report.run_plots import grouped_points, learning_rate_sweep, training_curves

LOG = {
    "epoch": [1, 2, 3, 4],
    "loss": [4.0, 2.0, 1.0, 0.5],
    "val_error": [None, 0.9, 0.7, 0.8],
}


def texts(svg: bytes) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("text")]


def markers(svg: bytes) -> list[list[tuple[float, float]]]:
    """Places of each line's markers, y upwards."""
    root = ElementTree.fromstring(svg)
    found = []
    for group in root.iter():
        if (group.get("id") or "").startswith("line2d"):
            uses = [e for e in group.iter() if e.tag.endswith("use")]
            found.append([(float(e.get("x")), -float(e.get("y"))) for e in uses])
    return found


def test_the_best_epoch_is_the_lowest_error():
    figure = training_curves(LOG, "MAE", "mm")
    assert "best epoch 3: 0.7000 mm" in figure.caption
    assert {"training loss", "validation MAE, mm", "epoch"} <= set(texts(figure.data))


def test_a_best_epoch_that_was_kept_is_marked_instead():
    assert "best epoch 2: 0.9000" in training_curves(LOG, "log loss", best_epoch=2).caption


def test_both_panels_have_one_axis_of_epochs():
    lines = [line for line in markers(training_curves(LOG, "MAE", "mm").data) if len(line) >= 3]
    loss, error = (next(line for line in lines if len(line) == count) for count in (4, 3))
    # A missing error leaves a gap: the rest stands under its own epochs.
    assert [x for x, _ in loss[1:]] == pytest.approx([x for x, _ in error])
    assert [y for _, y in loss] == sorted((y for _, y in loss), reverse=True)
    assert error[1][1] < error[2][1] < error[0][1]


def test_without_validation_there_is_one_panel():
    figure = training_curves(LOG | {"val_error": [None] * 4}, "MAE", "mm")
    assert "validation MAE, mm" not in texts(figure.data)
    assert "best" not in figure.caption


@pytest.mark.parametrize(
    "log",
    [
        {},
        {"epoch": [], "loss": [], "val_error": []},
        {"epoch": [1], "loss": [2.0], "val_error": [0.5]},
        {"epoch": [1, 2], "loss": [None, math.nan], "val_error": [math.nan, math.inf]},
        {"epoch": [1, 2, 3], "loss": [-1.0, -2.0, -9.0], "val_error": [0.1]},
    ],
    ids=["nothing", "no-epochs", "one", "not-finite", "negative-and-short"],
)
def test_odd_logs_are_drawn(log):
    ElementTree.fromstring(training_curves(log, "MAE", "mm").data)


def test_a_loss_of_many_magnitudes_has_plain_decades():
    log = {"epoch": [1, 2, 3], "loss": [100.0, 1.0, 0.01], "val_error": [None] * 3}
    shown = texts(training_curves(log, "MAE").data)
    assert {"100", "1", "0.01"} <= set(shown)
    assert not [text for text in shown if "$" in text]


def test_the_sweep_names_its_best():
    table = {"cls": {"0.001": 0.5, "0.1": 0.7}, "cls4": {"0.001": 0.9, "0.1": math.nan}}
    figure = learning_rate_sweep(table)
    assert "best: cls4 at 0.001, 90.0 %" in figure.caption
    assert {"cls", "cls4", "0.001", "0.1"} <= set(texts(figure.data))
    assert "nothing was swept" in learning_rate_sweep({}).caption


def test_groups_show_every_seed_with_mean_and_spread():
    values = [0.5, 0.7, 0.9]
    table = {"γ = 0": {"plain": values, "so": [0.6, None, math.nan]}, "γ = 2": {"plain": []}}
    figure = grouped_points(table, "MAE, mm")
    shown = texts(figure.data)
    assert f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f} (3)" in shown
    assert "0.600 (1), 2 failed" in shown
    assert "no figure" in shown
    seeds = next(line for line in markers(figure.data) if len(line) == 3)
    assert seeds[1][0] - seeds[0][0] == pytest.approx(seeds[2][0] - seeds[1][0], rel=1e-4)
    assert "4 runs in 2 groups" in figure.alt


def test_rows_stand_in_the_order_of_the_table():
    table = {"b": {"2": [1.0], "1": [2.0]}, "a": {"2": [3.0]}}
    lines = [line for line in markers(grouped_points(table, "x").data) if len(line) == 1]
    seeds = [line[0] for line in lines if line[0][0]]
    assert [x for x, _ in seeds[-3:]] == sorted(x for x, _ in seeds[-3:])
    assert [y for _, y in seeds[-3:]] == sorted((y for _, y in seeds[-3:]), reverse=True)


@pytest.mark.parametrize("table", [{}, {"g": {}}, {"g": {"v": [None]}}])
def test_tables_without_figures_are_drawn(table):
    assert "no figures" in texts(grouped_points(table, "MAE").data)
