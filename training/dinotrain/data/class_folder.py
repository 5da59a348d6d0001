"""The classification task's reader: a folder per class becomes a data set.

    cat/1.jpg  dog/2.jpg                      split 80 : 10 : 10, class by class
    train/cat/1.jpg  val/cat/2.jpg  test/…    split as it lies there

Every picture is judged before anything is refused, so that a folder is mended in one go.
Source: METHODS D.
"""

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import msgspec

from dinotrain.data.balance import empty_notes
from dinotrain.data.dataset import Dataset, ImageRef, Sample, Split, assign_splits, fingerprint
from dinotrain.data.judging import Told, judge_all, judge_picture
from dinotrain.data.origin import read_origin
from dinotrain.data.problems import Problems
from dinotrain.errors import DataError

LABEL = "class"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
SPLIT_FOLDERS: dict[str, Split] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


def read_class_folder(
    path: Path,
    *,
    image_size: tuple[int, int],
    seed: int = 0,
    skip_unreadable: bool = False,
    progress: Told | None = None,
) -> Dataset:
    """Read a folder of classes; every picture is decoded once.

    The same picture twice (by its bytes) is one subject, so that it cannot be in two splits.

    Args:
        path: holds a folder per class, or folders named train, val and test that do.
        image_size: (height, width) of what ``Dataset.load`` gives.
        seed: of the split, where the folders do not give it.
        skip_unreadable: leave out pictures that cannot be read, and say so in ``Dataset.skipped``,
            instead of refusing; everything else that is wrong is still refused.
        progress: told of pictures judged.

    Returns:
        Samples in the order of their paths; the value ``class`` is the number of the class, in the
        order of the classes' names.

    Raises:
        DataError: no such folder, fewer than two classes, a class without pictures, pictures that
            cannot be read, one picture in two classes or in two given splits. Ten problems are
            told in full, and all pictures that cannot be read are named.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such folder. Give one that holds a folder per class.")
    given: dict[Path, Split | None] = {
        folder: SPLIT_FOLDERS[folder.name] for folder in _folders(path) if _is_split(folder)
    }
    roots: dict[Path, Split | None] = given or {path: None}
    others = [folder for folder in _folders(path) if given and folder not in given]
    if others:
        raise DataError(
            f"{path}: '{others[0].name}' lies beside {', '.join(f.name for f in given)}. "
            "Give folders of splits, or folders of classes, not both."
        )
    classes = tuple(sorted({folder.name for root in roots for folder in _folders(root)}))
    if len(classes) < 2:
        raise DataError(
            f"{path}: {len(classes)} classes; two or more are needed, a folder of pictures each"
        )
    problems = Problems(path, skip_unreadable)
    samples = _read(path, roots, classes, problems, progress)
    problems.refuse()
    if not given:
        samples = _draw_splits(samples, seed)
    source, synthetic = read_origin(path)
    notes = [*_repeated_notes(samples), *empty_notes(samples, classes)]
    return Dataset(
        samples=tuple(samples),
        image_size=image_size,
        fingerprint=fingerprint(tuple(samples)),
        classes=classes,
        notes=tuple(notes),
        skipped=problems.skipped,
        source=source or path.resolve().name,
        synthetic=synthetic,
    )


def _folders(path: Path) -> list[Path]:
    return sorted(f for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))


def _is_split(folder: Path) -> bool:
    """A class may be called 'test' too: a split holds folders, a class holds pictures."""
    return folder.name in SPLIT_FOLDERS and bool(_folders(folder))


class _File(NamedTuple):
    """A picture as it lies there."""

    path: Path
    shown: str
    """Its path in the folder, for messages."""
    name: str
    """Its class."""
    split: Split | None


def _list(path: Path, roots: dict[Path, Split | None], name: str) -> list[_File]:
    """Return the pictures of a class."""
    return [
        _File(file, file.relative_to(path).as_posix(), name, split)
        for root, split in roots.items()
        for file in sorted((root / name).rglob("*"))
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    ]


def _read(
    path: Path,
    roots: dict[Path, Split | None],
    classes: tuple[str, ...],
    problems: Problems,
    progress: Told | None,
) -> list[Sample]:
    files = [file for name in classes for file in _list(path, roots, name)]
    samples: list[Sample] = []
    seen: dict[str, _File] = {}
    judged = judge_all(judge_picture, [file.path for file in files], progress)
    for file, found in zip(files, judged, strict=True):
        if found.problem:
            problems.unreadable(file.shown, found.problem)
            continue
        first = seen.setdefault(found.digest, file)
        if first.name != file.name:
            problems.add(file.shown, f"the same picture as {first.shown}, of two classes")
        if first.split != file.split:
            problems.add(file.shown, f"the same picture as {first.shown}, in two splits")
        samples.append(
            Sample(
                subject_id=found.digest[:16],
                part=file.shown,
                split="train" if file.split is None else file.split,
                images={"image": ImageRef(path=file.path, digest=found.digest)},
                values={LABEL: float(classes.index(file.name))},
            )
        )
    for name in sorted(set(classes) - {file.name for file in files}):
        problems.add(name, f"class '{name}' has no picture ({', '.join(SUFFIXES)})")
    if problems.skips:
        unread = {file.name for file in files} - {file.name for file in seen.values()}
        for name in sorted(unread):
            problems.add(name, f"class '{name}' has no picture that can be read")
    return samples


def _repeated_notes(samples: list[Sample]) -> list[str]:
    """Note pictures that lie there twice, which are one subject."""
    first: dict[str, str] = {}
    again = [s for s in samples if first.setdefault(s.subject_id, s.part) != s.part]
    if not again:
        return []
    noun = "picture is" if len(again) == 1 else "pictures are"
    one = again[0]
    return [
        f"{len(again)} {noun} copies of others, such as {one.part} of {first[one.subject_id]}; "
        "copies stay in one split"
    ]


def _draw_splits(samples: list[Sample], seed: int) -> list[Sample]:
    """Split class by class, so that each split shows all classes that are not tiny."""
    subjects: dict[float, list[str]] = defaultdict(list)
    for sample in samples:
        if sample.subject_id not in subjects[sample.values[LABEL]]:
            subjects[sample.values[LABEL]].append(sample.subject_id)
    splits: dict[str, Split] = {}
    for names in subjects.values():
        splits |= assign_splits(names, seed)
    return [msgspec.structs.replace(s, split=splits[s.subject_id]) for s in samples]
