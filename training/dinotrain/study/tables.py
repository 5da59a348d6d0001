"""The tables at the end of a study, for the terminal and the page alike, and as plain values."""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinotrain.data.dataset import Dataset
from dinotrain.report.page import Cell, Table
from dinotrain.report.text import NOTHING, number, percent, signed
from dinotrain.study.comparison import (
    Difference,
    Spread,
    Steadiness,
    compare,
    spread,
    steadiness,
)
from dinotrain.study.ledger import RunRecord
from dinotrain.study.plan import StudyRequest, Variant

ERROR = "mae_mm"
FIGURES: Mapping[str, str] = {
    ERROR: "MAE, mm",
    "mse_mm2": "MSE, mm²",
    "r2": "R²",
    "interval_subjects_covered": "coverage",
    "interval_width_mm": "interval width, mm",
    "crps_mm": "CRPS, mm",
}
"""Metrics of a run that are averaged over seeds; a variant may lack some."""
FEW_SEEDS = 10


class StudyResult:
    """The runs of a study, and what they come to.

    Args:
        request: what was asked for.
        records: one per variant and seed.
        dataset: all splits, as seed 0 has them.
        page: the file for people.
    """

    def __init__(
        self, request: StudyRequest, records: list[RunRecord], dataset: Dataset, page: Path
    ) -> None:
        self.request = request
        self.records = records
        self.dataset = dataset
        self.page = page
        self.outputs = tuple(records[0].metrics)
        self.runs = {
            variant: sorted(
                (r for r in records if (r.group, r.variant) == variant), key=lambda r: r.seed
            )
            for variant in request.variants
        }

    @property
    def notice(self) -> str:
        """What must be told of every figure."""
        return self.records[0].notice

    @cached_property
    def one_split(self) -> bool:
        """Whether all seeds have the same test samples."""
        return len({record.fingerprint for record in self.records}) == 1

    def values(self, variant: Variant, output: str, figure: str) -> list[float | None]:
        """Return a figure of a variant, one per seed."""
        return [run.metrics[output].get(figure) for run in self.runs[variant]]

    def figure(self, variant: Variant, output: str, figure: str) -> Spread:
        """Return a figure's mean and spread over seeds."""
        return spread(self.values(variant, output, figure))

    def baseline(self, output: str) -> Spread:
        """Return the mean absolute error of always answering the mean of the training labels."""
        first = next(iter(self.runs.values()))
        return spread([run.metrics[output].get("mean_predictor", {}).get(ERROR) for run in first])

    def difference(self, variant: Variant, output: str) -> Difference | None:
        """Return the change of the mean absolute error; None of the reference itself."""
        base = self.request.reference(variant)
        if base == variant:
            return None
        return compare(self.values(variant, output, ERROR), self.values(base, output, ERROR))

    def steadiness(self, variant: Variant, output: str) -> Steadiness | None:
        """Return how much predictions move between seeds; None where seeds differ in samples."""
        if not self.one_split:
            return None
        base = self.request.reference(variant)
        found = steadiness(self._predicted(variant, output), self._predicted(base, output))
        if base == variant:
            return Steadiness(std=found.std, change=None, low=None, high=None)
        return found

    def _predicted(self, variant: Variant, output: str) -> NDArray[np.float64]:
        """(seeds, samples)."""
        rows = [run.predicted[output] for run in self.runs[variant]]
        return np.array([[np.nan if v is None else v for v in row] for row in rows], np.float64)

    def plain(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        import msgspec

        return {
            "study": self.request.study.name,
            "report": str(self.page),
            "seeds": self.request.seeds,
            "test_samples": len(self.dataset.split("test").samples),
            "data": self.dataset.source,
            "fingerprint": self.dataset.fingerprint,
            "backbone": self.records[0].backbone,
            "notice": self.notice,
            "mean_predictor": {o: msgspec.to_builtins(self.baseline(o)) for o in self.outputs},
            "variants": [
                {
                    "group": variant.group,
                    "variant": variant.name,
                    "against": list(self.request.reference(variant)),
                    "outputs": {
                        output: {
                            "figures": {
                                name: msgspec.to_builtins(self.figure(variant, output, name))
                                for name in FIGURES
                            },
                            "difference": msgspec.to_builtins(self.difference(variant, output)),
                            "between_seeds": msgspec.to_builtins(self.steadiness(variant, output)),
                        }
                        for output in self.outputs
                    },
                }
                for variant in self.request.variants
            ],
        }


def error_table(result: StudyResult) -> Table:
    """Mean absolute errors, the mean predictor last."""
    rows: list[list[Cell]] = [
        [
            variant.group,
            variant.name,
            *(_spread(result.figure(variant, output, ERROR)) for output in result.outputs),
        ]
        for variant in result.request.variants
    ]
    base = [_spread(result.baseline(output), always=True) for output in result.outputs]
    rows.append(["mean predictor", "mean of the training labels", *base])
    test = len(result.dataset.split("test").samples)
    return Table(
        columns=("group", "variant", *result.outputs),
        rows=rows,
        caption=f"Mean absolute error in mm on {test} test samples: mean ± standard deviation of "
        f"{_seeds(result.request.seeds)}.",
        quiet=[len(rows) - 1],
    )


def difference_table(result: StudyResult) -> Table:
    """Paired differences of the mean absolute error."""

    def cells(variant: Variant, output: str) -> list[Cell]:
        found = result.difference(variant, output)
        if found is None:
            return []
        p = NOTHING if found.p is None else "< 0.001" if found.p < 0.001 else number(found.p)
        return [signed(found.mean), _range(found.low, found.high, signed), p]

    return Table(
        columns=("output", "group", "variant", "difference", "95 % interval", "p"),
        rows=_long(result, cells),
        caption=f"Difference of the mean absolute error in mm to {_reference(result)}: paired "
        f"t-test over {_seeds(result.request.seeds)}, not corrected for their number.",
    )


def figure_table(result: StudyResult) -> Table:
    """What else was measured, means over seeds."""
    names = [name for name in FIGURES if name != ERROR]

    def cells(variant: Variant, output: str) -> list[Cell]:
        return [number(result.figure(variant, output, name).mean) for name in names]

    return Table(
        columns=("output", "group", "variant", *(FIGURES[name] for name in names)),
        rows=_long(result, cells),
        caption="Other figures on the test samples, means over seeds. Coverage: share of people "
        f"whose eyes all lie in the interval, which promises {percent(_promised(result), 0)}; CRPS "
        "where a standard deviation is given.",
    )


def steadiness_table(result: StudyResult) -> Table:
    """How much one eye's value moves between seeds."""

    def cells(variant: Variant, output: str) -> list[Cell]:
        found = result.steadiness(variant, output)
        if found is None:
            return [NOTHING] * 3
        return [
            number(found.std),
            percent(found.change, 0),
            _range(found.low, found.high, lambda value: percent(value, 0)),
        ]

    return Table(
        columns=("output", "group", "variant", "deviation, mm", "variance", "without a seed"),
        rows=_long(result, cells),
        caption="How much one eye's value moves from seed to seed: standard deviation, and its "
        f"variance against {_reference(result)} (−20 %: a fifth less); last, the range of that "
        "when any one seed is left out.",
    )


def run_table(result: StudyResult) -> Table:
    """Every run."""
    return Table(
        columns=(
            "group",
            "variant",
            "seed",
            "best epoch",
            "epochs",
            *result.outputs,
            "seconds",
        ),
        rows=[
            [
                run.group,
                run.variant,
                run.seed,
                run.best_epoch,
                run.epochs,
                *(number(run.metrics[output].get(ERROR)) for output in result.outputs),
                number(run.seconds, 0),
            ]
            for variant in result.request.variants
            for run in result.runs[variant]
        ],
        caption="Mean absolute errors in mm on the test samples. The checkpoints are in the folder "
        "runs, unless they were dropped.",
    )


def closing_tables(result: StudyResult) -> list[Table]:
    """Return the tables that a study ends with on a terminal."""
    tables = [error_table(result), difference_table(result)]
    return [*tables, steadiness_table(result)] if result.one_split else tables


def warning(result: StudyResult) -> str:
    """Say how little few seeds tell."""
    seeds = result.request.seeds
    parts = []
    if seeds < 2:
        parts.append("One seed tells nothing about chance: no difference here can be judged.")
    elif seeds < FEW_SEEDS:
        parts.append(
            f"{seeds} seeds tell little: a standard deviation of so few is itself uncertain by "
            f"{percent(1 / np.sqrt(2 * (seeds - 1)), 0)} or so, and of twenty comparisons one is "
            "below p = 0.05 by chance."
        )
    parts.append(
        "Seeds vary what chance does in training; the test samples are few and the same, so that "
        "no interval here covers other people's eyes."
    )
    if not result.one_split:
        parts.append(
            "The data leave the split blank: it was drawn anew with each seed, and differences "
            "between seeds are those of test samples too."
        )
    return " ".join(parts)


def _long(result: StudyResult, cells: Callable[[Variant, str], list[Cell]]) -> list[list[Cell]]:
    """One row per output and variant; those without cells are left out."""
    return [
        [output, variant.group, variant.name, *found]
        for output in result.outputs
        for variant in result.request.variants
        if (found := cells(variant, output))
    ]


def _reference(result: StudyResult) -> str:
    if result.request.study.against == "group":
        return "the first variant of the group"
    return "“{}, {}”".format(*result.request.variants[0])


def _spread(found: Spread, always: bool = False) -> str:
    text = number(found.mean)
    # A constant answer does not depend on the seed, unless the split does.
    return (
        text if not found.std and (always or found.std is None) else f"{text} ± {number(found.std)}"
    )


def _range(low: float | None, high: float | None, write: Callable[[float], str]) -> str:
    return NOTHING if low is None or high is None else f"{write(low)} … {write(high)}"


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _promised(result: StudyResult) -> float:
    return result.request.config(result.request.variants[0], 0, Path()).coverage
