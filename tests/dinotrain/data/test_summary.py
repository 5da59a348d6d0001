"""What people are told about a data set: counts, shares, ranges, and what to look at."""

import math
from pathlib import Path

import msgspec
import numpy as np
import pytest

from dinotrain.data.dataset import Dataset, ImageRef, MaskRef, Sample, share_names
from dinotrain.data.summary import LabelRange, summarise, summary_lines
from dinotrain.report.data_section import data_section
from dinotrain.report.page import Report, render_page
from dinotrain.tasks import get_task


def sample(number: int, split: str, values: dict[str, float], **more) -> Sample:
    return Sample(
        subject_id=f"s{number // 2}",
        part=str(number),
        split=split,  # type: ignore[arg-type]
        images={"image": ImageRef(path=Path("x"), digest=str(number))},
        values=values,
        **more,
    )


def dataset(samples, **more) -> Dataset:
    return Dataset(samples=tuple(samples), image_size=(28, 28), fingerprint="f", **more)


@pytest.fixture
def eyes() -> Dataset:
    """Fourteen training eyes and two test eyes; LF of three of the first."""
    return dataset(
        sample(
            number,
            "train" if number < 14 else "test",
            {"mrd1": number / 4, "mrd2": 5.0, "lf": 10.0 + number if number < 3 else math.nan},
        )
        for number in range(16)
    )


def test_ranges_of_labels_have_units(eyes):
    summary = get_task("eyelid").summarise(eyes)
    assert summary.splits == {"train": 14, "val": 0, "test": 2}
    assert summary.split_subjects == {"train": 7, "val": 0, "test": 1}
    assert summary.classes == {}
    values = np.arange(14) / 4
    assert summary.labels["mrd1_mm"]["train"] == LabelRange(
        count=14, low=0.0, mean=values.mean(), high=3.25
    )
    assert summary.labels["lf_mm"]["test"] == LabelRange(count=0, low=None, mean=None, high=None)
    assert summary.notes == (
        "lf_mm has 3 training labels: fewer than 10",
        "lf_mm has no label in test",
    )
    lines = summary_lines(summary)
    assert lines[0] == "data: train 14, val 0, test 2 samples, of 8 subjects"
    assert "mrd1_mm: 14 training labels, 0 to 3.25, mean 1.62" in lines
    assert "note: lf_mm has no label in test" in lines


def test_imbalance_is_noted():
    counts = {"a": 101, "b": 10, "c": 9, "d": 11}
    classes = tuple(counts)
    samples = [
        sample(number, "train", {"class": float(classes.index(name))})
        for name, count in counts.items()
        for number in range(count)
    ]
    summary = get_task("classify").summarise(dataset(samples, classes=classes))
    assert summary.classes["a"] == {"train": 101}
    assert summary.shares["b"]["train"] == 10 / 131
    assert summary.notes == (
        "class 'b' has 10 training samples: less than a tenth of 'a' (101)",
        "class 'c' has 9 training samples: less than a tenth of 'a' (101), and fewer than 10",
    )
    # A tenth is not less than a tenth.
    fewer = dataset([s for s in samples if s.part != "100"], classes=classes)
    notes = get_task("classify").summarise(fewer).notes
    assert [note[:9] for note in notes] == ["class 'c'"]
    assert "training samples by class: c 9, b 10, d 11, a 101" in summary_lines(summary)


def test_masks_count_pictures_and_shares_count_pixels():
    classes = ("ground", "dust")
    names = share_names(classes)
    mask = MaskRef(path=Path("m"), digest="m")
    samples = [
        sample(n, "train", dict(zip(names, shares, strict=True)), mask=mask)
        for n, shares in enumerate([(1.0, 0.0)] * 10 + [(0.5, 0.5)] * 2 + [(math.nan, math.nan)])
    ]
    summary = get_task("segment").summarise(dataset(samples, classes=classes))
    assert summary.classes == {"ground": {"train": 12}, "dust": {"train": 2}}
    assert summary.shares["dust"]["train"] == pytest.approx(1 / 12)
    assert summary.shares_of == "pixels"
    assert summary.notes == ("class 'dust' has 2 training samples: fewer than 10",)


def test_what_was_left_out_is_counted_and_listed(eyes):
    left = msgspec.structs.replace(eyes, skipped=("row 7: a.png: cut", "row 9: b.png: empty"))
    lines = summary_lines(get_task("eyelid").summarise(left))
    assert lines[-3:] == [
        "left out 2 pictures that cannot be read:",
        "  row 7: a.png: cut",
        "  row 9: b.png: empty",
    ]


def test_many_notes_and_classes_are_cut_short():
    classes = tuple(f"c{n}" for n in range(30))
    samples = [sample(n, "train", {"class": float(n)}) for n in range(30)]
    summary = summarise(dataset(samples, classes=classes), ("class",), lambda values: {})
    lines = summary_lines(summary)
    assert lines[1].endswith(", c11 1, and 18 more")
    assert lines[-1].startswith("and 20 more notes")


def test_the_report_shows_counts_and_notes(eyes):
    left = msgspec.structs.replace(eyes, skipped=("row 7: <b>.png: cut",))
    page = render_page(
        Report(title="t", sections=[data_section(get_task("eyelid").summarise(left))])
    )
    assert "Note: lf_mm has no label in test." in page
    assert "row 7: &lt;b&gt;.png: cut" in page
    samples = [sample(n, "train", {"class": float(n % 2)}) for n in range(8)]
    summary = get_task("classify").summarise(dataset(samples, classes=("a<", "b")))
    page = render_page(Report(title="t", sections=[data_section(summary)]))
    assert "a&lt;" in page
    assert "50 %" in page
    assert "fewer than 10" in page
