"""The segmentation task's reader: folders of pictures and of masks become a data set.

    images/part_01.jpg     any picture that ``images`` reads
    masks/part_01.png      of the same stem and size: class ids, 255 = ignore; see ``masks``
    classes.txt            one name a line, id 0 (background) first; or classes.json
    split.csv              optional: stem, group, split

Every file is judged before anything is refused, so that a folder is mended in one go.
Source: METHODS C (classes, ignore index, split 80 : 10 : 10 stratified by defect presence).
"""

import csv
import math
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np

from dinotrain.data.balance import empty_notes
from dinotrain.data.class_list import read_classes, read_text
from dinotrain.data.dataset import (
    SPLITS,
    Dataset,
    ImageRef,
    MaskRef,
    Sample,
    fingerprint,
    share_names,
    stratified_splits,
)
from dinotrain.data.images import verify_image
from dinotrain.data.judging import Told, bare, judge_all
from dinotrain.data.masks import IGNORE, read_mask
from dinotrain.data.origin import read_origin
from dinotrain.data.problems import SHOWN, Problems
from dinotrain.digests import digest
from dinotrain.errors import DataError

IMAGE = "image"
SPLIT_COLUMNS = ("stem", "group", "split")
# What desktops leave behind in folders.
_LITTER = {"thumbs.db", "desktop.ini"}


def read_mask_folder(
    path: Path,
    *,
    image_size: tuple[int, int],
    seed: int = 0,
    skip_unreadable: bool = False,
    progress: Told | None = None,
) -> Dataset:
    """Read a folder of pictures and masks; every file is decoded once and checked.

    ``split.csv`` may name per stem its ``group`` (blank: a group of its own) and its ``split``
    (blank: drawn by group, 80 : 10 : 10, stratified by the classes that the masks show).

    Args:
        path: the folder that holds ``images``, ``masks`` and ``classes.txt`` or ``classes.json``.
        image_size: (height, width) of what ``Dataset.load`` and ``load_mask`` give.
        seed: of the split, where ``split.csv`` leaves it open.
        skip_unreadable: leave out pairs of which a file cannot be read, and say so in
            ``Dataset.skipped``, instead of refusing; everything else that is wrong is still
            refused.
        progress: called with (pairs checked, pairs) after each.

    Returns:
        Samples in the order of their stems; ``subject_id`` is the group, ``part`` the stem, and the
        values are the shares of the mask's labelled pixels per class (NaN where none is labelled).

    Raises:
        DataError: the folder or any of its files cannot be used; ten problems are told
            in full, and all files that cannot be read are named.
    """
    for name in ("images", "masks"):
        if not (path / name).is_dir():
            raise DataError(
                f"{path}: no folder '{name}' in it. A segmentation data set has images/, masks/ "
                "and classes.txt."
            )
    classes = read_classes(path)
    problems = Problems(path, skip_unreadable)
    pairs = _pair(path, problems)
    places = _read_split(path, {stem for stem, _, _ in pairs}, problems)
    found = _check_pairs(path, pairs, len(classes), problems, progress)
    _check_duplicates(found, problems)
    problems.refuse()
    if not found:
        raise DataError(f"{path}: no picture is left. {'; '.join(problems.skipped[:SHOWN])}")
    _check_binary(path, found)
    samples = _assign(found, classes, places, seed)
    if not any(sample.split == "train" for sample in samples):
        raise DataError(
            f"{path}: no picture is in the split 'train'. Name train rows in split.csv, or leave "
            "the column blank."
        )
    source, synthetic = read_origin(path)
    return Dataset(
        samples=samples,
        classes=classes,
        image_size=image_size,
        fingerprint=fingerprint(samples, classes),
        notes=(*_unlabelled_notes(samples, classes), *empty_notes(samples, classes)),
        skipped=problems.skipped,
        source=source or path.resolve().name,
        synthetic=synthetic,
    )


class _Pair(msgspec.Struct, frozen=True, kw_only=True):
    """A picture and its mask that fit together."""

    stem: str
    image: Path
    mask: Path
    image_digest: str
    mask_digest: str
    pixels: tuple[int, ...]
    """Labelled pixels per class."""
    ignored: int
    """Pixels without a label."""

    @property
    def shown(self) -> tuple[int, ...]:
        """Classes that the mask shows, besides the background."""
        return tuple(c for c, count in enumerate(self.pixels) if c and count)


def _files(folder: Path, problems: Problems) -> dict[str, Path]:
    """{stem: file}, sorted; folders and doubled stems are problems."""
    result: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        name = f"{folder.name}/{file.name}"
        if file.name.startswith(".") or file.name.lower() in _LITTER:
            continue
        if not file.is_file():
            problems.add(name, "a folder; all files stand directly in " + folder.name)
        elif file.stem in result:
            problems.add(name, f"the stem '{file.stem}' is also that of {result[file.stem].name}")
        else:
            result[file.stem] = file
    return result


def _pair(path: Path, problems: Problems) -> list[tuple[str, Path, Path]]:
    images, masks = _files(path / "images", problems), _files(path / "masks", problems)
    if not images and not masks:
        raise DataError(
            f"{path}: images/ and masks/ are empty. Put pictures and their masks there."
        )
    for stem in sorted(images.keys() - masks.keys()):
        problems.add(f"images/{images[stem].name}", f"no mask masks/{stem}.png")
    for stem in sorted(masks.keys() - images.keys()):
        problems.add(f"masks/{masks[stem].name}", f"no picture of the stem '{stem}' in images/")
    return [(stem, images[stem], masks[stem]) for stem in images if stem in masks]


def _check_pairs(
    path: Path,
    pairs: list[tuple[str, Path, Path]],
    classes: int,
    problems: Problems,
    progress: Told | None,
) -> list[_Pair]:
    def check(pair: tuple[str, Path, Path]) -> tuple[_Pair | None, list[tuple[str, str, bool]]]:
        return _check_pair(path, *pair, classes)

    found: list[_Pair] = []
    for good, wrong in judge_all(check, pairs, progress):
        for file, text, unreadable in wrong:
            if unreadable:
                problems.unreadable(file, text)
            else:
                problems.add(file, text)
        if good is not None:
            found.append(good)
    return found


def _check_pair(
    path: Path, stem: str, image: Path, mask: Path, classes: int
) -> tuple[_Pair | None, list[tuple[str, str, bool]]]:
    """Return the pair, or what is wrong as (file, text, whether it is unreadable)."""
    size = ids = None
    wrong: list[tuple[str, str, bool]] = []
    try:
        size = verify_image(image)
    except DataError as error:
        wrong.append((_short(path, image), bare(error, image), True))
    try:
        ids = read_mask(mask)
    except DataError as error:
        wrong.append((_short(path, mask), bare(error, mask), True))
    if size is None or ids is None:
        return None, wrong
    if ids.shape != size:
        wrong.append((_short(path, mask), _size_text(ids.shape, size, image), False))
    counts = np.bincount(ids.ravel(), minlength=IGNORE + 1).tolist()
    unknown = [value for value in range(classes, IGNORE) if counts[value]]
    if unknown:
        listed = ", ".join(f"{value} ({counts[value]} pixels)" for value in unknown[:5])
        more = f" and {len(unknown) - 5} more values" if len(unknown) > 5 else ""
        text = f"holds {listed}{more}; 0 to {classes - 1} and {IGNORE} (ignore) are accepted"
        wrong.append((_short(path, mask), text, False))
    if wrong:
        return None, wrong
    return _Pair(
        stem=stem,
        image=image,
        mask=mask,
        image_digest=digest(image),
        mask_digest=digest(mask),
        pixels=tuple(counts[:classes]),
        ignored=counts[IGNORE],
    ), []


def _check_duplicates(pairs: Iterable[_Pair], problems: Problems) -> None:
    seen: dict[str, _Pair] = {}
    for pair in pairs:
        first = seen.setdefault(pair.image_digest, pair)
        if first is not pair:
            problems.add(
                f"images/{pair.image.name}", f"the same picture as images/{first.image.name}"
            )


def _check_binary(path: Path, pairs: list[_Pair]) -> None:
    """Refuse masks of 0 and 255 alone: there 255 means the defect, not ``IGNORE``."""
    if any(pair.shown for pair in pairs) or not any(pair.ignored for pair in pairs):
        return
    raise DataError(
        f"{path}: the masks hold 0 and {IGNORE} only, and {IGNORE} means ignore. Write class ids, "
        "1 for the first class after the background."
    )


def _read_split(path: Path, stems: set[str], problems: Problems) -> dict[str, tuple[str, str]]:
    """Return {stem: (group, split)} of split.csv, either of them blank where it is open."""
    file = path / "split.csv"
    if not file.is_file():
        return {}
    places: dict[str, tuple[str, str]] = {}
    held: dict[str, tuple[str, int]] = {}
    for line, row in _read_rows(file):
        stem, group, split = (row.get(name, "") for name in SPLIT_COLUMNS)
        if not stem or stem in places:
            problems.add("split.csv", f"stem '{stem}' twice" if stem else "stem is blank", line)
            continue
        places[stem] = (group, split)
        if split and split not in SPLITS:
            text = f"split is '{split}', not one of {', '.join(SPLITS)}"
            problems.add("split.csv", text, line)
        if stem not in stems and not _is_listed(path, stem):
            near = Path(stem).stem
            hint = f"; write '{near}'" if near != stem and near in stems else ""
            problems.add("split.csv", f"no picture of the stem '{stem}'{hint}", line)
        if group and split in SPLITS:
            other, first = held.setdefault(group, (split, line))
            if other != split:
                text = (
                    f"group '{group}' is in '{split}' here and in '{other}' in row {first}; a "
                    "group stays in one split"
                )
                problems.add("split.csv", text, line)
    for stem in sorted(stems - places.keys()):
        problems.add("split.csv", f"no row for the stem '{stem}'")
    return places


def _is_listed(path: Path, stem: str) -> bool:
    """Whether a file of this stem exists whose partner is missing: that is told already."""
    return any(
        file.stem == stem for name in ("images", "masks") for file in (path / name).iterdir()
    )


def _read_rows(file: Path) -> list[tuple[int, dict[str, str]]]:
    """Return (line, {column: text}) per row of split.csv."""
    reader = csv.reader(read_text(file).splitlines(), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if "stem" not in header or len(header) < 2 or not set(header) <= set(SPLIT_COLUMNS):
            raise DataError(
                f"{file}: its columns are {', '.join(header) or 'none'}; stem and one or both of "
                "group and split are accepted"
            )
        rows = []
        for cells in reader:
            if any(cell.strip() for cell in cells):
                if len(cells) != len(header):
                    raise DataError(
                        f"{file}: row {reader.line_num} has {len(cells)} fields, the header has "
                        f"{len(header)}"
                    )
                row = dict(zip(header, (cell.strip() for cell in cells), strict=True))
                rows.append((reader.line_num, row))
        return rows
    except csv.Error as error:
        raise DataError(f"{file}: not a CSV that can be read ({error}). Save it again.") from error


def _assign(
    pairs: list[_Pair], classes: tuple[str, ...], places: dict[str, tuple[str, str]], seed: int
) -> tuple[Sample, ...]:
    """Give every pair its group and split; groups with a named split keep it."""
    groups = {pair.stem: places.get(pair.stem, ("", ""))[0] or pair.stem for pair in pairs}
    named: dict[str, str] = {}
    for pair in pairs:
        split = places.get(pair.stem, ("", ""))[1]
        if split:
            named[groups[pair.stem]] = split
    strata: dict[str, set[int]] = {}
    for pair in pairs:
        if groups[pair.stem] not in named:
            strata.setdefault(groups[pair.stem], set()).update(pair.shown)
    drawn = stratified_splits({g: tuple(sorted(shown)) for g, shown in strata.items()}, seed)
    splits = named | drawn
    return tuple(
        Sample(
            subject_id=groups[pair.stem],
            part=pair.stem,
            split=splits[groups[pair.stem]],  # type: ignore[arg-type]
            images={IMAGE: ImageRef(path=pair.image, digest=pair.image_digest)},
            mask=MaskRef(path=pair.mask, digest=pair.mask_digest),
            values=_shares(pair, classes),
        )
        for pair in pairs
    )


def _shares(pair: _Pair, classes: tuple[str, ...]) -> dict[str, float]:
    labelled = sum(pair.pixels)
    shares = (count / labelled if labelled else math.nan for count in pair.pixels)
    return dict(zip(share_names(classes), shares, strict=True))


def _unlabelled_notes(samples: tuple[Sample, ...], classes: tuple[str, ...]) -> list[str]:
    first = share_names(classes)[0]
    return [
        f"masks/{sample.mask.path.name}: no pixel has a label"
        for sample in samples
        if sample.mask and math.isnan(sample.values[first])
    ]


def _size_text(mask: tuple[int, ...], image: tuple[int, ...], file: Path) -> str:
    turned = " (is it turned?)" if mask == image[::-1] else ""
    return (
        f"{mask[1]}×{mask[0]} pixels, its picture {file.name} has {image[1]}×{image[0]}{turned}; "
        "they must be equal"
    )


def _short(path: Path, file: Path) -> str:
    return file.relative_to(path).as_posix()
