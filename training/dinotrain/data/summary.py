"""What is in a data set, for people: splits, classes, ranges of labels, and what to look at.

``data check``, the start of a training run, its report and its dry run all tell the same.
"""

from collections.abc import Callable, Mapping

import msgspec
import numpy as np

from dinotrain.data.balance import balance_notes, label_notes
from dinotrain.data.dataset import SPLITS, Dataset, label_table

CLASSES_SHOWN = 12
NOTES_SHOWN = 10


class LabelRange(msgspec.Struct, frozen=True, kw_only=True):
    """Labels of one quantity in one split, in its unit; None where there is none."""

    count: int
    low: float | None
    mean: float | None
    high: float | None


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """A data set in figures; splits without samples are left out of ``classes`` and ``labels``."""

    source: str
    samples: int
    subjects: int
    splits: dict[str, int]
    """{split: samples}."""
    split_subjects: dict[str, int]
    """{split: subjects}."""
    classes: dict[str, dict[str, int]]
    """{class: {split: samples}}; with masks, samples that show it."""
    shares: dict[str, dict[str, float]]
    """{class: {split: share}} of the samples; with masks, of the labelled pixels."""
    shares_of: str
    """What the shares are of: samples, pixels, or nothing where there are no classes."""
    labels: dict[str, dict[str, LabelRange]]
    """{quantity with its unit: {split: range}}."""
    notes: tuple[str, ...]
    """What is worth a look."""
    skipped: tuple[str, ...]
    """What was left out because it cannot be read."""
    fingerprint: str
    """Of what was read, less what was left out."""


def summarise(
    dataset: Dataset,
    labels: tuple[str, ...],
    expected: Callable[[dict[str, float]], Mapping[str, float]],
) -> Summary:
    """Count a data set.

    Args:
        dataset: all its splits.
        labels: ``Task.labels``.
        expected: ``Task.expected``, which knows the quantities' units.
    """
    parts = {name: dataset.split(name) for name in SPLITS}
    there = {name: part for name, part in parts.items() if part.samples}
    masks = any(sample.mask for sample in dataset.samples)
    quantities = {} if dataset.classes else _names(labels, expected)
    counts = {name: part.class_counts() for name, part in there.items()}
    shares = {
        name: part.class_shares() if masks else _shares(counts[name])
        for name, part in there.items()
    }
    return Summary(
        source=dataset.source,
        samples=len(dataset.samples),
        subjects=_subjects(dataset),
        splits={name: len(part.samples) for name, part in parts.items()},
        split_subjects={name: _subjects(part) for name, part in parts.items()},
        classes={c: {name: counts[name][c] for name in there} for c in dataset.classes},
        shares={c: {n: shares[n].get(c, 0.0) for n in there} for c in dataset.classes},
        shares_of=("pixels" if masks else "samples") if dataset.classes else "",
        labels={
            shown: {split: _range(part, name) for split, part in there.items()}
            for name, shown in quantities.items()
        },
        notes=(*dataset.notes, *balance_notes(dataset), *label_notes(dataset, quantities)),
        skipped=dataset.skipped,
        fingerprint=dataset.fingerprint,
    )


def summary_lines(summary: Summary) -> list[str]:
    """Tell a data set in a few lines, as a training run does at its start."""
    held = ", ".join(f"{name} {count}" for name, count in summary.splits.items())
    lines = [f"data: {held} samples, of {summary.subjects} subjects"]
    if summary.classes:
        # The rarest first: they are what to look at.
        train = {name: counts.get("train", 0) for name, counts in summary.classes.items()}
        ranked = sorted(train, key=lambda name: train[name])
        listed = ", ".join(f"{name} {train[name]}" for name in ranked[:CLASSES_SHOWN])
        more = f", and {len(ranked) - CLASSES_SHOWN} more" if len(ranked) > CLASSES_SHOWN else ""
        lines.append(f"training samples by class: {listed}{more}")
    for name, splits in summary.labels.items():
        found = splits.get("train")
        if found is not None and found.low is not None:
            lines.append(
                f"{name}: {found.count} training labels, {found.low:g} to {found.high:g}, "
                f"mean {found.mean:.3g}"
            )
    lines += [f"note: {text}" for text in summary.notes[:NOTES_SHOWN]]
    if len(summary.notes) > NOTES_SHOWN:
        lines.append(
            f"and {len(summary.notes) - NOTES_SHOWN} more notes: `dinoexport data check` tells all"
        )
    return lines + skipped_lines(summary.skipped)


def skipped_lines(skipped: tuple[str, ...]) -> list[str]:
    """Tell how many pictures were left out, and which."""
    if not skipped:
        return []
    noun = "picture" if len(skipped) == 1 else "pictures"
    return [f"left out {len(skipped)} {noun} that cannot be read:", *(f"  {s}" for s in skipped)]


def _names(
    labels: tuple[str, ...], expected: Callable[[dict[str, float]], Mapping[str, float]]
) -> dict[str, str]:
    """{name of a value: its name with the unit}."""
    return {name: next(iter(expected({name: 0.0})), name) for name in labels}


def _subjects(dataset: Dataset) -> int:
    return len({sample.subject_id for sample in dataset.samples})


def _shares(counts: dict[str, int]) -> dict[str, float]:
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items()} if total else {}


def _range(part: Dataset, name: str) -> LabelRange:
    values = label_table(part.samples, (name,))[:, 0]
    known = values[np.isfinite(values)]
    if not known.size:
        return LabelRange(count=0, low=None, mean=None, high=None)
    low, mean, high = float(known.min()), float(known.mean()), float(known.max())
    return LabelRange(count=int(known.size), low=low, mean=mean, high=high)
