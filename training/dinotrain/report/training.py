"""The page about one trained model: how training went, and its figures on held-out samples."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from numpy.typing import NDArray

from dinotrain.checkpoint import CheckpointConfig
from dinotrain.data.dataset import Dataset, load_image
from dinotrain.data.summary import Summary
from dinotrain.model import TaskModel
from dinotrain.objectives.base import Predictions
from dinotrain.report.data_section import data_section
from dinotrain.report.page import Report, Section, Table, write_report
from dinotrain.report.run_plots import learning_rate_sweep, training_curves
from dinotrain.report.text import NOTHING, number
from dinotrain.tasks.base import Case

MAX_BITS = 24
SPLITS = {"val": "Validation", "test": "Test"}


class JudgedSplit(NamedTuple):
    """Samples of one split with predictions, truth, and metrics."""

    dataset: Dataset
    predicted: Predictions
    true: NDArray[Any]
    metrics: Any


def report_path(checkpoint: Path) -> Path:
    """Return where the page about a checkpoint stands: beside it."""
    return checkpoint.with_suffix(".html")


def write_training_report(
    path: Path,
    model: TaskModel,
    header: CheckpointConfig,
    error_name: str,
    judged: Mapping[str, JudgedSplit],
    data: Summary | None = None,
) -> Path:
    """Write the page about a model.

    Args:
        path: of the HTML file.
        model: trained.
        header: its story.
        error_name: of the validation error in the log.
        judged: by split; those held out from the choice of the weights say most.
        data: what it was trained and judged on; None leaves that section out.

    Raises:
        UsageError: the file cannot be written.
    """
    sections = [_course(header, error_name)]
    if data is not None:
        sections.append(data_section(data))
    for name, split in judged.items():
        section = describe_split(model, split)
        title = f"{SPLITS.get(name, name)}: {section.title}"
        sections.append(msgspec.structs.replace(section, title=title))
    report = Report(
        title=header.name, notice=header.notice, facts=_facts(model, header), sections=sections
    )
    return write_report(path, report)


def describe_split(model: TaskModel, split: JudgedSplit) -> Section:
    """Return the task's own section about one split."""
    samples = split.dataset.samples

    def load(index: int) -> dict[str, Any]:
        images = samples[index].images
        return {name: load_image(ref, split.dataset.image_size) for name, ref in images.items()}

    case = Case(
        config=model.config,
        predicted=split.predicted,
        true=split.true,
        names=[sample.name for sample in samples],
        load=load,
        metrics=split.metrics,
    )
    return model.task.section(case)


def _course(header: CheckpointConfig, error_name: str) -> Section:
    story = header.training
    figures = []
    if "log" in story:
        figures.append(training_curves(story["log"], error_name, best_epoch=story["best_epoch"]))
    if "probe" in story:
        figures.append(learning_rate_sweep(story["probe"]["val_accuracy"]))
    text = f"Training ended early: {story['stopped']}." if story.get("stopped") else ""
    return Section(title="Training", text=text, tables=_bits(header), figures=figures)


def _bits(header: CheckpointConfig) -> list[Table]:
    errors: dict[str, Any] = header.training.get("bit_calibration_error") or {}
    count = max(map(len, errors.values()), default=0)
    # A thermometer has hundreds.
    if not 0 < count <= MAX_BITS:
        return []
    rows = [
        [name, *(NOTHING if error is None else number(error, 3) for error in found)]
        for name, found in errors.items()
    ]
    return [
        Table(
            columns=("test samples", *(f"bit {n}" for n in range(1, count + 1))),
            rows=rows,
            caption="Expected calibration error of each bit, the most significant first: how far "
            "its stated probability is from how often it is set.",
        )
    ]


def _facts(model: TaskModel, header: CheckpointConfig) -> dict[str, Any]:
    story = header.training
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in model.parameters())
    facts = {
        "task": header.task,
        "trained on": header.trained_on,
        "backbone": f"{header.backbone.name}, {story.get('mode', 'frozen')}",
        "image size": "×".join(map(str, header.image_size)) + " px",
        "features": header.features.kind,
        "head": header.head.kind,
        "loss": story.get("loss", ""),
        "parameters": f"{whole:,}, of which {trained:,} were trained",
        "best epoch": story.get("best_epoch", ""),
        "versions": ", ".join(f"{name} {value}" for name, value in header.versions.items()),
    }
    return {name: value for name, value in facts.items() if value != ""}
