"""The part of a training report about its data: counts per class and split, and what was noted."""

from dinotrain.data.summary import Summary
from dinotrain.report.page import Cell, Section, Table


def data_section(summary: Summary) -> Section:
    """Return the section about what a model was trained and judged on."""
    splits = [name for name, count in summary.splits.items() if count]
    rows: list[list[Cell]] = [
        ["samples", *(summary.splits[name] for name in splits)],
        ["subjects", *(summary.split_subjects[name] for name in splits)],
    ]
    tables = [Table(columns=["", *splits], rows=rows, caption="Samples by split")]
    if summary.classes:
        tables.append(_classes(summary, splits))
    if summary.labels:
        tables.append(_labels(summary, splits))
    paragraphs = [f"Note: {text}." for text in summary.notes]
    if summary.skipped:
        count, listed = len(summary.skipped), "; ".join(summary.skipped)
        paragraphs.append(f"Left out, because they cannot be read ({count}): {listed}")
    return Section(title="Data", text="\n\n".join(paragraphs), tables=tables)


def _classes(summary: Summary, splits: list[str]) -> Table:
    rows: list[list[Cell]] = [
        [
            name,
            *(counts[split] for split in splits),
            *(f"{100 * summary.shares[name][split]:.3g} %" for split in splits[:1]),
        ]
        for name, counts in summary.classes.items()
    ]
    share = f"share of {splits[0]} {summary.shares_of}" if splits else ""
    what = "Samples that show a class" if summary.shares_of == "pixels" else "Samples by class"
    return Table(columns=["class", *splits, share], rows=rows, caption=what)


def _labels(summary: Summary, splits: list[str]) -> Table:
    rows: list[list[Cell]] = [
        [name, split, found.count, found.low, found.mean, found.high]
        for name, ranges in summary.labels.items()
        for split, found in ranges.items()
        if split in splits
    ]
    columns = ["quantity", "split", "labels", "lowest", "mean", "highest"]
    return Table(columns=columns, rows=rows, caption="Labels")
