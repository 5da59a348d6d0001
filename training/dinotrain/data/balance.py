"""What is worth a look about the classes and labels of a data set, though it is accepted."""

from collections.abc import Sequence

import numpy as np

from dinotrain.data.dataset import SPLITS, Dataset, Sample, label_table

FEW = 10
"""Training samples under which little is learnt, and figures on a tenth of them say nothing."""
RATIO = 10
"""How many times smaller than the largest a class is noted."""


def empty_notes(samples: Sequence[Sample], classes: tuple[str, ...]) -> list[str]:
    """Note the classes that no sample shows, or none of a split that has samples."""
    splits = [split for split in SPLITS if any(sample.split == split for sample in samples)]
    shown = {(number, s.split) for s in samples for number in s.shown(classes)}
    notes = []
    for number, name in enumerate(classes):
        missing = [split for split in splits if (number, split) not in shown]
        if missing == splits:
            notes.append(f"class {number} '{name}' is empty: no sample shows it")
        elif missing:
            notes.append(f"class {number} '{name}' is empty in {', '.join(missing)}")
    return notes


def balance_notes(dataset: Dataset) -> list[str]:
    """Note the classes that are small beside the largest, or at all, among training samples.

    With masks a sample counts for every class that it shows. Classes of no sample are not noted
    here: see ``empty_notes``.
    """
    counts = dataset.split("train").class_counts()
    if not counts:
        return []
    largest = max(counts, key=lambda name: counts[name])
    notes = []
    for name, count in counts.items():
        reasons = []
        if RATIO * count < counts[largest]:
            reasons.append(f"less than a tenth of '{largest}' ({counts[largest]})")
        if count < FEW:
            reasons.append(f"fewer than {FEW}")
        if count and reasons:
            noun = "sample" if count == 1 else "samples"
            notes.append(f"class '{name}' has {count} training {noun}: {', and '.join(reasons)}")
    return notes


def label_notes(dataset: Dataset, labels: dict[str, str]) -> list[str]:
    """Note the quantities of which a split has no label, or training few.

    Args:
        dataset: of measured quantities.
        labels: {name of the value: name that its user knows}.
    """
    notes = []
    for split in SPLITS:
        samples = dataset.split(split).samples
        if not samples:
            continue
        counts = np.isfinite(label_table(samples, tuple(labels))).sum(axis=0).tolist()
        for shown, count in zip(labels.values(), counts, strict=True):
            if not count:
                notes.append(f"{shown} has no label in {split}")
            elif split == "train" and count < FEW:
                notes.append(f"{shown} has {count} training labels: fewer than {FEW}")
    return notes
