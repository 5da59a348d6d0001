"""The page at the end of a study: every group beside every other, seed by seed."""

from pathlib import Path
from typing import Any

from dinotrain.report.page import Figure, Report, Section, write_report
from dinotrain.report.run_plots import grouped_points
from dinotrain.study.published import comparability
from dinotrain.study.tables import (
    ERROR,
    StudyResult,
    difference_table,
    error_table,
    figure_table,
    run_table,
    steadiness_table,
    warning,
)


def write_page(result: StudyResult) -> Path:
    """Write the page of a study; the same records give the same bytes.

    Raises:
        UsageError: the file cannot be written.
    """
    study = result.request.study
    source = _source(result)
    sections = [
        Section(
            title="Errors",
            text=f"{study.text}\n\n{warning(result)}",
            tables=[error_table(result), difference_table(result)],
            figures=[_points(result, output, ERROR, "MAE") for output in result.outputs],
        ),
        Section(
            title="Spread between seeds",
            text="A head that lands elsewhere with each seed gives one eye another value each "
            "time, even where its mean error stays.",
            tables=[steadiness_table(result)],
        ),
        Section(
            title="Intervals and other figures",
            tables=[figure_table(result)],
            figures=[
                _points(result, output, "crps_mm", "CRPS")
                for output in result.outputs
                if _any(result, output, "crps_mm")
            ],
        ),
        comparability(study, result.records[0].backbone, source),
        Section(title="Runs", tables=[run_table(result)]),
    ]
    return write_report(
        result.page,
        Report(
            title=study.title, notice=result.notice, facts=_facts(result, source), sections=sections
        ),
    )


def _points(result: StudyResult, output: str, figure: str, label: str) -> Figure:
    table: dict[str, dict[str, list[float | None]]] = {}
    for variant in result.request.variants:
        values = result.values(variant, output, figure)
        # All variants on every drawing, so that each keeps its colour.
        given = values if any(value is not None for value in values) else []
        table.setdefault(variant.group, {})[variant.name] = given
    return grouped_points(table, f"{label} of {output}, mm")


def _any(result: StudyResult, output: str, figure: str) -> bool:
    variants = result.request.variants
    return any(result.figure(variant, output, figure).seeds for variant in variants)


def _source(result: StudyResult) -> str:
    return result.records[0].trained_on.partition("; backbone: ")[0]


def _facts(result: StudyResult, source: str) -> dict[str, Any]:
    first = result.records[0]
    request = result.request
    origin = first.trained_on.partition("; backbone: ")[2]
    return {
        "study": request.study.name,
        "data": source,
        "backbone": f"{first.backbone} ({origin})" if origin else first.backbone,
        "the paper's backbone": request.study.backbone,
        "image size": "×".join(map(str, request.image_size)) + " px",
        "runs": f"{len(request.variants)} variants × {request.seeds} seeds",
        "epochs": f"{request.epochs} at most" if request.epochs else "each recipe's own",
        "versions": ", ".join(f"{name} {value}" for name, value in first.versions.items()),
    }
