"""The classification task's reader: a folder per class becomes a data set.

    cat/1.jpg  dog/2.jpg                      split 80 : 10 : 10, class by class
    train/cat/1.jpg  val/cat/2.jpg  test/…    split as it lies there

Every picture's header is judged before anything is refused, so that a folder is mended in one go.
Source: METHODS D.
"""

from collections import defaultdict
from pathlib import Path

import msgspec

from dinotrain.data.dataset import Dataset, ImageRef, Sample, Split, assign_splits, fingerprint
from dinotrain.data.images import check_image
from dinotrain.data.origin import read_origin
from dinotrain.digests import digest
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
SHOWN = 10


def read_class_folder(path: Path, *, image_size: tuple[int, int], seed: int = 0) -> Dataset:
    """Read a folder of classes.

    The same picture twice (by its bytes) is one subject, so that it cannot be in two splits.

    Args:
        path: holds a folder per class, or folders named train, val and test that do.
        image_size: (height, width) of what ``Dataset.load`` gives.
        seed: of the split, where the folders do not give it.

    Returns:
        Samples in the order of their paths; the value ``class`` is the number of the class, in the
        order of the classes' names.

    Raises:
        DataError: no such folder, fewer than two classes, a class without pictures, pictures that
            cannot be read, one picture in two classes or in two given splits. Up to ten problems
            are named.
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
    samples, problems = _read(path, roots, classes)
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise DataError(f"{path}: " + ";\n  ".join([*problems[:SHOWN], *more]))
    if not given:
        samples = _draw_splits(samples, seed)
    source, synthetic = read_origin(path)
    return Dataset(
        samples=tuple(samples),
        image_size=image_size,
        fingerprint=fingerprint(tuple(samples)),
        classes=classes,
        source=source or path.resolve().name,
        synthetic=synthetic,
    )


def _folders(path: Path) -> list[Path]:
    return sorted(f for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))


def _is_split(folder: Path) -> bool:
    """A class may be called 'test' too: a split holds folders, a class holds pictures."""
    return folder.name in SPLIT_FOLDERS and bool(_folders(folder))


def _read(
    path: Path, roots: dict[Path, Split | None], classes: tuple[str, ...]
) -> tuple[list[Sample], list[str]]:
    samples: list[Sample] = []
    problems: list[str] = []
    seen: dict[str, tuple[str, Split | None, str]] = {}
    for name in classes:
        files: list[tuple[Path, Split | None]] = [
            (file, split)
            for root, split in roots.items()
            for file in sorted((root / name).rglob("*"))
            if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
        ]
        if not files:
            problems.append(f"class '{name}' has no picture ({', '.join(SUFFIXES)})")
        for file, split in files:
            shown = str(file.relative_to(path))
            try:
                check_image(file)
                found = digest(file)
            except (DataError, OSError) as error:
                problems.append(str(error))
                continue
            first: tuple[str, Split | None, str] = (name, split, shown)
            other_name, other_split, other = seen.setdefault(found, first)
            if other_name != name:
                problems.append(f"{other} and {shown} are the same picture, of two classes")
            if other_split != split:
                problems.append(f"{other} and {shown} are the same picture, in two splits")
            samples.append(
                Sample(
                    subject_id=found[:16],
                    part=shown,
                    split="train" if split is None else split,
                    images={"image": ImageRef(path=file, digest=found)},
                    values={LABEL: float(classes.index(name))},
                )
            )
    return samples, problems


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
