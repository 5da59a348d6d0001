"""The eyelid task's reader: a CSV, one row per picture, becomes a data set, one sample per eye.

Every row is judged before anything is refused, so that a list is mended in one go. A picture with
``px_per_mm`` is cropped to the window around its centre, which therefore lies on the canthi; one
without shows the window already. Left eyes are mirrored to right orientation. Source: METHODS B3.
"""

import csv
import math
import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import msgspec

from dinotrain.data.dataset import (
    SPLITS,
    Dataset,
    ImageRef,
    Sample,
    Split,
    assign_splits,
    fingerprint,
)
from dinotrain.data.images import MIN_SIDE_PX
from dinotrain.data.judging import Judged, Told, judge_all, judge_picture
from dinotrain.data.origin import read_origin
from dinotrain.data.problems import SHOWN, Problems
from dinotrain.errors import DataError
from dinotrain.tasks.base import TargetSpec

GAZES = ("primary", "up", "down")
REQUIRED = ("subject_id", "eye", "gaze", "path", "mrd1_mm", "mrd2_mm", "lf_mm")
OPTIONAL = ("px_per_mm", "label_step_mm", "split")
PRIMARY = "primary"
"""The gaze that every eye has."""
MAX_CSV_BYTES = 100 * 2**20
MIN_COVER = 0.5
"""Least part of the window, along either side, that a picture shows; less means a wrong scale."""


class _Row(msgspec.Struct, kw_only=True):
    """One row that was understood; ``line`` is its line in the file, the header being 1."""

    line: int
    subject_id: str
    eye: Literal["L", "R"]
    gaze: str
    split: Split | Literal[""]
    image: ImageRef | None
    unreadable: str
    """Why there is no image."""
    labels: dict[str, float]
    label_step: float | None

    @property
    def owner(self) -> tuple[str, str]:
        """Whose picture it is: subject and eye."""
        return self.subject_id, self.eye


def read_manifest(
    path: Path,
    *,
    image_size: tuple[int, int],
    window_mm: float,
    seed: int = 0,
    targets: tuple[TargetSpec, ...] = (),
    skip_unreadable: bool = False,
    progress: Told | None = None,
) -> Dataset:
    """Read a manifest and check every row; every picture is decoded once.

    Columns: subject_id, eye (L or R), gaze (primary, up or down), path (relative to the manifest),
    mrd1_mm, mrd2_mm, lf_mm (blank or nan: no label), and optionally px_per_mm (blank: the picture
    shows the window already), label_step_mm, split (train, val or test; blank: drawn by subject,
    80 : 10 : 10). Labels belong to the eye: they may stand in any of its rows, and must not differ.

    Args:
        path: the CSV, or the folder that holds ``manifest.csv``.
        image_size: (height, width) of the model's input.
        window_mm: width of the crop.
        seed: of the split, where the manifest leaves it blank.
        targets: names and ranges; the eyelid task's where none are given.
        skip_unreadable: leave out pictures that cannot be read, and say so in ``Dataset.skipped``,
            instead of refusing: an eye keeps its other pictures, and the labels of all its rows,
            but without primary gaze it is left out. Everything else that is wrong is still
            refused.
        progress: told of pictures judged.

    Raises:
        DataError: the file or any of its rows cannot be used; ten problems are told in full, and
            all rows whose picture cannot be read are named.
    """
    if not targets:
        from dinotrain.tasks.eyelid import EyelidTask

        targets = EyelidTask.targets
    file = path / "manifest.csv" if path.is_dir() else path
    problems = Problems(file, skip_unreadable)
    cells = list(_read_cells(file))
    if not cells:
        raise DataError(f"{file}: the manifest has a header and no rows. Add one row per picture.")
    rows = _read_rows(file.parent, cells, image_size, window_mm, targets, problems, progress)
    samples = _group(rows, seed, [target.name for target in targets])
    if not samples:
        listed = "; ".join(problems.skipped[:SHOWN])
        raise DataError(f"{file}: no eye is left. {listed}")
    if not any(sample.split == "train" for sample in samples):
        raise DataError(
            f"{file}: no row is in the split 'train'. Name train rows, or leave the column blank."
        )
    source, synthetic = read_origin(file.parent)
    return Dataset(
        samples=samples,
        image_size=image_size,
        fingerprint=fingerprint(samples),
        notes=tuple(_spelling_notes(samples)),
        skipped=problems.skipped,
        source=source or file.parent.resolve().name,
        synthetic=synthetic,
    )


def _read_rows(
    folder: Path,
    cells: list[tuple[int, dict[str, str]]],
    image_size: tuple[int, int],
    window_mm: float,
    targets: tuple[TargetSpec, ...],
    problems: Problems,
    progress: Told | None,
) -> list["_Row"]:
    """Return the rows whose picture can be read, of eyes with primary gaze; all else is refused."""
    reader = _RowReader(folder, image_size, window_mm, targets)
    places = [reader.place(row) for _, row in cells]
    paths = list(dict.fromkeys(path for path in places if path is not None))
    judged = dict(zip(paths, judge_all(judge_picture, paths, progress), strict=True))
    rows: list[_Row] = []
    for (line, row), path in zip(cells, places, strict=True):
        found = reader.read(line, row, judged.get(path) if path else None)
        for text in found.problems:
            problems.add("", text, line)
        if found.row is not None:
            rows.append(found.row)
        elif path is not None and judged[path].problem:
            # Of no use as a row, and yet to be mended.
            problems.unreadable("", f"{row['path']}: {judged[path].problem}", line)
    blind = {row.owner for row in rows if row.gaze == PRIMARY and row.image is None}
    for row in rows:
        if row.image is None:
            eye = "/".join(row.owner)
            then = "is left out" if row.owner in blind else "keeps its other pictures"
            problems.unreadable("", row.unreadable, row.line, f"Eye {eye} {then}.")
    for line, text in _check_together(rows):
        problems.add("", text, line)
    if not problems:
        # A bad row may be the missing one: asked only once all are good.
        for line, text in _check_primary(rows):
            problems.add("", text, line)
    problems.refuse()
    return [row for row in rows if row.owner not in blind]


def _read_cells(file: Path) -> Iterable[tuple[int, dict[str, str]]]:
    """Yield (line, {column: text}) per row; the columns are checked first."""
    if not file.is_file():
        raise DataError(
            f"{file}: no such manifest. Give a CSV with the columns {', '.join(REQUIRED)}, or the "
            "folder that holds manifest.csv."
        )
    if file.stat().st_size > MAX_CSV_BYTES:
        raise DataError(f"{file}: larger than 100 MB; this is no manifest. Give the CSV itself.")
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, strict=True)
            header = [name.strip() for name in next(reader, [])]
            _check_header(file, header)
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                row = dict(zip(header, (cell.strip() for cell in cells), strict=False))
                if len(cells) != len(header):
                    row = {"": f"has {len(cells)} fields, the header has {len(header)}"}
                yield reader.line_num, row
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: not UTF-8 text (byte {error.start}). Save it as CSV in UTF-8."
        ) from error
    except csv.Error as error:
        raise DataError(f"{file}: not a CSV that can be read ({error}). Save it again.") from error


def _check_header(file: Path, header: list[str]) -> None:
    if not any(header):
        raise DataError(f"{file}: the manifest is empty. Its columns are {', '.join(REQUIRED)}.")
    if len(header) == 1 and ";" in header[0]:
        raise DataError(f"{file}: columns are separated by ';'. Save it with commas.")
    known = (*REQUIRED, *OPTIONAL)
    problems = []
    for name in header:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.6)
            problems.append(f"unknown column '{name}'" + (f", meant '{near[0]}'?" if near else ""))
    problems += [f"column '{name}' twice" for name in known if header.count(name) > 1]
    problems += [f"column '{name}' is missing" for name in REQUIRED if name not in header]
    if problems:
        raise DataError(f"{file}: {'; '.join(problems)}. Known columns: {', '.join(known)}.")


class _Found(msgspec.Struct):
    """What became of one row: the row, or what is wrong with it."""

    row: _Row | None
    problems: list[str]


class _RowReader:
    """Judges one row at a time; collects all that is wrong with it."""

    def __init__(
        self,
        folder: Path,
        image_size: tuple[int, int],
        window_mm: float,
        targets: tuple[TargetSpec, ...],
    ) -> None:
        self.folder = folder
        self.window_mm = window_mm
        self.window_height_mm = window_mm * image_size[0] / image_size[1]
        self.targets = targets

    def place(self, cells: dict[str, str]) -> Path | None:
        """Return where a row's picture is, or None where the row does not say it rightly."""
        text = cells.get("path", "")
        inside = Path(os.path.normpath(text))
        if not text or inside.is_absolute() or inside.parts[:1] == ("..",) or "\0" in text:
            return None
        return self.folder / inside

    def read(self, line: int, cells: dict[str, str], judged: Judged | None) -> _Found:
        """Return the row, or all that is wrong with it.

        Args:
            line: of the file.
            cells: {column: text}.
            judged: the picture; None where ``place`` is.
        """
        if "" in cells:
            return _Found(None, [cells[""]])
        problems: list[str] = []
        if not cells["subject_id"]:
            problems.append("subject_id is blank")
        problems += _check_choice("eye", cells["eye"], ("L", "R"))
        problems += _check_choice("gaze", cells["gaze"], GAZES)
        split = cells.get("split", "")
        if split:
            problems += _check_choice("split", split, SPLITS)
        labels: dict[str, float] = {}
        for target in self.targets:
            column = target.output_name
            value = _number(column, _label_text(cells[column]), problems)
            if value is None:
                continue
            if not target.low <= value < target.low + target.span:
                problems.append(
                    f"{column} is {value:g}, the range is {target.low:g} up to "
                    f"{target.low + target.span:g}"
                )
            labels[target.name] = value
        scale = _number("px_per_mm", cells.get("px_per_mm", ""), problems)
        step = _number("label_step_mm", cells.get("label_step_mm", ""), problems)
        for column, value in (("px_per_mm", scale), ("label_step_mm", step)):
            if value is not None and value <= 0:
                problems.append(f"{column} is {value:g}, it must be above 0")
        image, path = None, self.place(cells)
        if path is None or judged is None:
            text = cells["path"]
            problems.append(
                f"path '{text}' leaves the manifest's folder; paths are relative to it"
                if text
                else "path is blank"
            )
        elif not judged.problem:
            image = self._image(path, judged, scale, cells["eye"] == "L", problems)
        if problems:
            return _Found(None, problems)
        row = _Row(
            line=line,
            subject_id=cells["subject_id"],
            eye=cells["eye"],  # type: ignore[arg-type]
            gaze=cells["gaze"],
            split=split,  # type: ignore[arg-type]
            image=image,
            unreadable=f"{cells['path']}: {judged.problem}" if judged and judged.problem else "",
            labels=labels,
            label_step=step,
        )
        return _Found(row, [])

    def _image(
        self,
        path: Path,
        judged: Judged,
        scale: float | None,
        mirror: bool,
        problems: list[str],
    ) -> ImageRef:
        found, (height, width) = judged.digest, judged.size
        if scale is None:
            return ImageRef(path=path, digest=found, window_mm=self.window_mm, mirror=mirror)
        if 0 < scale * self.window_mm < MIN_SIDE_PX:
            problems.append(
                f"px_per_mm {scale:g} leaves {scale * self.window_mm:.1f} pixels for the "
                f"{self.window_mm:g} mm window; at least {MIN_SIDE_PX} are needed"
            )
        elif scale > 0:
            covered_w, covered_h = width / scale, height / scale
            if covered_w < MIN_COVER * self.window_mm or covered_h < (
                MIN_COVER * self.window_height_mm
            ):
                problems.append(
                    f"px_per_mm {scale:g} makes the picture {covered_w:.1f}×{covered_h:.1f} mm, "
                    f"less than half of the {self.window_mm:g} mm window"
                )
        return ImageRef(
            path=path, digest=found, px_per_mm=scale, window_mm=self.window_mm, mirror=mirror
        )


def _check_choice(column: str, value: str, known: tuple[str, ...]) -> list[str]:
    if value in known:
        return []
    return [f"{column} is '{value}', not one of {', '.join(known)}"]


def _label_text(text: str) -> str:
    """Return a label's text; what programs write for a missing number is a blank."""
    return "" if text.lower() == "nan" else text


def _number(column: str, text: str, problems: list[str]) -> float | None:
    """Return a finite number, or None for a blank or, with a problem noted, for anything else."""
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        hint = ", write a decimal point" if "," in text else ""
        problems.append(f"{column} is '{text}', not a number{hint}")
        return None
    if not math.isfinite(value):
        problems.append(f"{column} is '{text}'; leave it blank where there is no label")
        return None
    return value


def _check_together(rows: list[_Row]) -> list[tuple[int, str]]:
    """Return what is wrong between rows: duplicates, leaks between splits, differing labels."""
    problems: list[tuple[int, str]] = []
    views: dict[tuple[str, str, str], _Row] = {}
    pictures: dict[str, _Row] = {}
    splits: dict[str, _Row] = {}
    facts: dict[tuple[str, str, str], tuple[float, int]] = {}
    for row in rows:
        view = (row.subject_id, row.eye, row.gaze)
        first = views.setdefault(view, row)
        if first is not row:
            problems.append((row.line, f"{'/'.join(view)} is already in row {first.line}"))
        same = pictures.setdefault(row.image.digest, row) if row.image else row
        if same is not row:
            problems.append((row.line, f"the same picture as in row {same.line}; cut one per eye"))
        if row.split:
            other = splits.setdefault(row.subject_id, row)
            if other.split != row.split:
                problems.append(
                    (
                        row.line,
                        f"subject '{row.subject_id}' is in '{row.split}' here and in "
                        f"'{other.split}' in row {other.line}; a subject stays in one split",
                    )
                )
        known = dict(row.labels)
        if row.label_step is not None:
            known["label_step"] = row.label_step
        for name, value in known.items():
            held, line = facts.setdefault((row.subject_id, row.eye, name), (value, row.line))
            if held != value:
                problems.append(
                    (
                        row.line,
                        f"{name}_mm is {value:g} here and {held:g} in row {line}, "
                        f"for the same eye {row.subject_id}/{row.eye}",
                    )
                )
    return problems


def _check_primary(rows: list[_Row]) -> list[tuple[int, str]]:
    """Return the eyes without the one gaze that every eye needs."""
    primary = {row.owner for row in rows if row.gaze == PRIMARY}
    lines: dict[tuple[str, str], int] = {}
    for row in rows:
        lines.setdefault(row.owner, row.line)
    return [
        (line, f"eye {'/'.join(eye)} has no picture in primary gaze")
        for eye, line in lines.items()
        if eye not in primary
    ]


def _group(rows: list[_Row], seed: int, targets: list[str]) -> tuple[Sample, ...]:
    """One sample per eye, in the order of the file."""
    named = {row.subject_id: row.split for row in rows if row.split}
    unnamed = sorted({row.subject_id for row in rows} - set(named))
    splits = named | assign_splits(unnamed, seed)
    eyes: dict[tuple[str, str], list[_Row]] = {}
    for row in rows:
        eyes.setdefault(row.owner, []).append(row)
    samples = []
    for (subject, eye), views in eyes.items():
        labels = {name: value for view in views for name, value in view.labels.items()}
        step = next((view.label_step for view in views if view.label_step is not None), None)
        samples.append(
            Sample(
                subject_id=subject,
                part=eye,
                split=splits[subject],  # type: ignore[arg-type]
                images={view.gaze: view.image for view in views if view.image is not None},
                values={name: labels.get(name, math.nan) for name in targets},
                label_step=step,
            )
        )
    return tuple(samples)


def _spelling_notes(samples: tuple[Sample, ...]) -> list[str]:
    """Note subjects that may be one: their names differ in upper and lower case alone."""
    spelled: dict[str, str] = {}
    notes = []
    for subject in sorted({sample.subject_id for sample in samples}):
        first = spelled.setdefault(subject.casefold(), subject)
        if first != subject:
            notes.append(
                f"subjects '{first}' and '{subject}' count as two; if they are one person, spell "
                "them alike, or they may stand in two splits"
            )
    return notes
