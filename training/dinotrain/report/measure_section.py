"""The section of a task that measures: agreement per target, stated uncertainty, worst cases."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinotrain.errors import ShapeError
from dinotrain.metrics.uncertainty import evaluate_uncertainty
from dinotrain.report.agreement_plots import (
    bland_altman,
    coverage_plot,
    interval_plot,
    parity_plot,
)
from dinotrain.report.cases import Load, check_rows, strip_of, worst
from dinotrain.report.page import Cell, Figure, Gallery, Section, Table
from dinotrain.report.pictures import picture_grid
from dinotrain.report.text import NOTHING, count, number, signed
from dinotrain.tasks.base import TargetSpec

Values = NDArray[np.floating]


def measure_section(
    predicted: Mapping[str, Values],
    true: Values,
    targets: Sequence[TargetSpec],
    names: Sequence[str],
    load: Load,
    metrics: Mapping[str, Mapping[str, Any]],
    stated_coverage: float | None = None,
) -> Section:
    """Describe measurements beside the true values.

    Args:
        predicted: {output name: (n,)}; standard deviations (``_std_``) and ends of intervals
            (``_low_``, ``_high_``) are shown where they are given.
        true: (n, targets), NaN where there is no label.
        targets: names and units of the columns.
        names: (n,), of the samples.
        load: gives the pictures of a sample.
        metrics: what ``evaluate_targets`` gives.
        stated_coverage: that the intervals promise, between 0 and 1, where known.

    Raises:
        ShapeError: the arrays do not fit each other, or a target has no prediction.
    """
    true = np.asarray(true, np.float64)
    check_rows("true", len(true), names)
    _check(predicted, true, targets)
    figures: list[Figure | Gallery] = []
    for column, target in enumerate(targets):
        guess, y = predicted[target.output_name], true[:, column]
        figures.append(parity_plot(guess, y, target.output_name, target.unit))
        figures.append(bland_altman(guess, y, target.output_name, target.unit))
    tables = [_agreement_table(targets, metrics)]
    stated = [target for target in targets if target.std_name in predicted]
    if stated:
        table, figure = _uncertainty(predicted, true, targets, stated)
        tables.append(table)
        figures.append(figure)
    figures += _intervals(predicted, true, targets, stated_coverage)
    for column, target in enumerate(targets):
        gallery = _worst(predicted[target.output_name], true[:, column], target, names, load)
        figures += [gallery] if gallery.pictures else []
    return Section(
        title="Agreement with the labels",
        text="Every figure stands beside what a constant answer, the mean of the training labels, "
        "would give: a model that does not beat it has learnt nothing from pictures.",
        tables=tables,
        figures=figures,
    )


def _check(predicted: Mapping[str, Values], true: Values, targets: Sequence[TargetSpec]) -> None:
    if true.ndim != 2 or true.shape[1] != len(targets):
        raise ShapeError(f"true is {true.shape}; (n, {len(targets)}) is needed, one per target")
    for target in targets:
        name = target.output_name
        if name not in predicted or np.shape(predicted[name]) != (len(true),):
            given = np.shape(predicted[name]) if name in predicted else "missing"
            raise ShapeError(f"predicted {name} is {given}; ({len(true)},) is needed")


def _agreement_table(
    targets: Sequence[TargetSpec], metrics: Mapping[str, Mapping[str, Any]]
) -> Table:
    columns = ("output", "answer", "n", "MAE", "RMSE", "R²", "ICC(2,1)", "r", "bias")
    rows: list[list[Cell]] = []
    for target in targets:
        row, unit = metrics.get(target.output_name, {}), target.unit
        base = row.get("mean_predictor", {})
        rows.append(
            [
                target.output_name,
                "model",
                count(row.get("n", 0)),
                *(number(row.get(f"{name}_{unit}")) for name in ("mae", "rmse")),
                *(number(row.get(name)) for name in ("r2", "icc_2_1", "pearson_r")),
                signed(row.get(f"bias_{unit}")),
                _range(row.get(f"loa_low_{unit}"), row.get(f"loa_high_{unit}")),
                *_close(row, unit),
            ]
        )
        if base:
            value = number(base.get(f"value_{unit}"), 2)
            errors = (number(base.get(f"{name}_{unit}")) for name in ("mae", "rmse"))
            blank = [NOTHING] * 5
            rows.append(
                [
                    target.output_name,
                    f"always {value} {unit}",
                    count(row.get("n", 0)),
                    *errors,
                    *blank,
                    *_close(base, unit),
                ]
            )
    return Table(
        columns=(*columns, "95 % limits", "within 0.5, %", "within 1.0, %"),
        rows=rows,
        caption="Errors in the unit that ends an output's name; bias is predicted − true.",
        quiet=[place for place, row in enumerate(rows) if row[1] != "model"],
    )


def _close(row: Mapping[str, Any], unit: str) -> list[str]:
    return [number(row.get(f"within_{limit}_{unit}_percent"), 1) for limit in ("0_5", "1_0")]


def _range(low: float | None, high: float | None) -> str:
    return NOTHING if low is None or high is None else f"{signed(low, 2)} … {signed(high, 2)}"


def _uncertainty(
    predicted: Mapping[str, Values],
    true: Values,
    targets: Sequence[TargetSpec],
    stated: Sequence[TargetSpec],
) -> tuple[Table, Figure]:
    columns = [targets.index(target) for target in stated]
    found = evaluate_uncertainty(
        np.stack([predicted[target.output_name] for target in stated], axis=1),
        np.stack([predicted[target.std_name] for target in stated], axis=1),
        true[:, columns],
        stated,
    )
    rows = [
        [
            target.output_name,
            number(found[target.output_name][f"mean_std_{target.unit}"]),
            number(found[target.output_name][f"crps_{target.unit}"]),
            number(found[target.output_name]["calibration_error"]),
        ]
        for target in stated
    ]
    table = Table(
        columns=("output", "mean standard deviation", "CRPS", "calibration error"),
        rows=rows,
        caption="Stated standard deviations; calibration error is mean |stated − empirical "
        "coverage|.",
    )
    curves = {name: found[name]["coverage"] for name in (t.output_name for t in stated)}
    return table, coverage_plot(curves)


def _intervals(
    predicted: Mapping[str, Values],
    true: Values,
    targets: Sequence[TargetSpec],
    stated: float | None,
) -> list[Figure]:
    figures = []
    for column, target in enumerate(targets):
        low = predicted.get(f"{target.name}_low_{target.unit}")
        high = predicted.get(f"{target.name}_high_{target.unit}")
        if low is None or high is None:
            continue
        y = true[:, column]
        figures.append(interval_plot(low, high, y, target.output_name, target.unit, stated))
    return figures


def _worst(
    guess: Values, y: Values, target: TargetSpec, names: Sequence[str], load: Load
) -> Gallery:
    guess, unit = np.asarray(guess, np.float64), target.unit
    error = np.abs(guess - y)
    # A prediction that is no number is the worst of all.
    error[~np.isfinite(guess) & np.isfinite(y)] = np.inf
    items = []
    for index in worst(error):
        strip, name = strip_of(index, names, load)
        items.append(
            (
                strip,
                f"{name}\npredicted {number(guess[index], 2)}, true {number(y[index], 2)}, "
                f"off by {signed(guess[index] - y[index], 2)} {unit}",
            )
        )
    return picture_grid(items, f"{target.output_name}: the largest errors")
