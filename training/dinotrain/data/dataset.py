"""A labelled data set, whatever the task: samples, their pictures and values, split by subject."""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from dinotrain.data.images import Pixels, crop_window, fit_image, read_image
from dinotrain.data.masks import Mask, fit_mask, read_mask

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class ImageRef(msgspec.Struct, frozen=True, kw_only=True):
    """One picture of a sample, and how its pixels become the model's input.

    Without ``px_per_mm`` the picture is taken to show the window already.
    """

    path: Path
    digest: str
    """sha256 of the file."""
    px_per_mm: float | None = None
    window_mm: float = 0.0
    mirror: bool = False

    @property
    def crop_key(self) -> str:
        """Text that differs whenever the crop differs; a part of a cache key."""
        return f"{self.px_per_mm!r}|{self.window_mm!r}|{self.mirror}"


class MaskRef(msgspec.Struct, frozen=True, kw_only=True):
    """The class of every pixel of a sample's only picture, in a file of the picture's size."""

    path: Path
    digest: str
    """sha256 of the file."""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured once: up to one picture per input of the task, and a value per target."""

    subject_id: str
    part: str
    """Which of the subject's samples it is, such as the eye."""
    split: Split
    images: dict[str, ImageRef]
    values: dict[str, float]
    """{target: value}; NaN where there is no label. With a mask: {share_name(class): share}."""
    mask: MaskRef | None = None
    """Where pixels have labels; ``values`` then are the shares of its labelled pixels per class."""
    label_step: float | None = None
    """Step that the labels were rounded to, in their unit."""

    @property
    def name(self) -> str:
        """Subject and part, for messages."""
        return f"{self.subject_id}/{self.part}"

    def shown(self, classes: Sequence[str]) -> tuple[int, ...]:
        """Return the numbers of the classes that the sample shows, by its mask or its label."""
        if self.mask:
            names = share_names(classes)
            return tuple(i for i, name in enumerate(names) if self.values[name] > 0)
        number = self.values.get("class", math.nan)
        return () if math.isnan(number) else (int(number),)


class Dataset(msgspec.Struct, frozen=True, kw_only=True):
    """Samples of one task; ``image_size`` is (height, width) of what ``load`` gives."""

    samples: tuple[Sample, ...]
    image_size: tuple[int, int]
    fingerprint: str
    """sha256 over labels, splits, crops and picture digests; independent of paths and of order."""
    classes: tuple[str, ...] = ()
    """Names of the classes, in the order of their numbers, where samples or pixels have classes."""
    notes: tuple[str, ...] = ()
    """What is worth a look though accepted: empty classes, masks without a label."""
    skipped: tuple[str, ...] = ()
    """What was left out because it cannot be read, a line each: file or row, and why."""
    source: str = ""
    """What the data are, in a few words."""
    synthetic: bool = False

    def split(self, *names: Split) -> "Dataset":
        """Return the samples of some splits, with the same fingerprint."""
        chosen = tuple(sample for sample in self.samples if sample.split in names)
        return msgspec.structs.replace(self, samples=chosen)

    def labels(self, targets: Sequence[str]) -> NDArray[np.float64]:
        """(samples, targets), NaN where there is no label."""
        return label_table(self.samples, targets)

    def class_counts(self) -> dict[str, int]:
        """Samples per class, {name: count}; with masks, samples that show the class at all.

        Empty where there are no classes.
        """
        counts = Counter(n for sample in self.samples for n in sample.shown(self.classes))
        return {name: counts[number] for number, name in enumerate(self.classes)}

    def class_shares(self) -> dict[str, float]:
        """Share of the labelled pixels per class, {name: share}; empty where there are no masks.

        Samples count alike, whatever their size: all of them train at one size.
        """
        shares = self.labels(share_names(self.classes))
        labelled = np.isfinite(shares).all(axis=1)
        if not self.classes or not labelled.any():
            return {}
        return dict(zip(self.classes, shares[labelled].mean(axis=0).tolist(), strict=True))

    def label_step(self) -> float | None:
        """Return the coarsest step of any label, or None where no sample names one."""
        steps = [sample.label_step for sample in self.samples if sample.label_step is not None]
        return max(steps, default=None)

    def load(self, image: ImageRef) -> Pixels:
        """(height, width, 3) uint8, cropped and oriented; see ``load_image``."""
        return load_image(image, self.image_size)


def share_names(classes: Sequence[str]) -> tuple[str, ...]:
    """Return the name of the value that holds a class's share of a mask, class by class."""
    return tuple(f"share of {name}" for name in classes)


def label_table(samples: Sequence[Sample], targets: Sequence[str]) -> NDArray[np.float64]:
    """(samples, targets), NaN where there is no label."""
    rows = [[sample.values.get(name, math.nan) for name in targets] for sample in samples]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(targets))


def load_image(image: ImageRef, image_size: tuple[int, int]) -> Pixels:
    """Read, crop and orient one picture.

    Returns:
        (height, width, 3) uint8; mirrored where the reference says so.

    Raises:
        DataError: the picture cannot be read.
    """
    pixels = read_image(image.path)
    if image.px_per_mm is None:
        pixels = fit_image(pixels, image_size)
    else:
        pixels = crop_window(pixels, image.px_per_mm, image.window_mm, image_size)
    return np.ascontiguousarray(pixels[:, ::-1] if image.mirror else pixels)


def load_mask(mask: MaskRef, image_size: tuple[int, int]) -> Mask:
    """Read a mask and cut and resize it as ``load_image`` does its picture.

    Returns:
        (height, width) uint8, class ids and 255; nearest pixels.

    Raises:
        DataError: the mask cannot be read.
    """
    return fit_mask(read_mask(mask.path), image_size)


def fingerprint(samples: tuple[Sample, ...], classes: Sequence[str] = ()) -> str:
    """sha256 over everything that training reads from the samples; order and paths do not count.

    Args:
        samples: of all splits.
        classes: names, where the order of the classes is no part of the samples.
    """
    lines = ["\x1f".join(classes)] if classes else []
    for sample in samples:
        images = [f"{k}={v.digest}|{v.crop_key}" for k, v in sorted(sample.images.items())]
        values = [f"{k}={v!r}" for k, v in sorted(sample.values.items())]
        facts = [sample.subject_id, sample.part, sample.split, repr(sample.label_step)]
        if sample.mask:
            facts.append(f"mask={sample.mask.digest}")
        lines.append("\x1f".join(facts + images + values))
    return hashlib.sha256("\x1e".join(sorted(lines)).encode()).hexdigest()


def assign_splits(subjects: list[str], seed: int) -> dict[str, Split]:
    """Split subjects 80 : 10 : 10 by the rank of a seeded hash.

    From five subjects on, validation and test get at least one each; fewer all train.
    """
    ranked = sorted(subjects, key=lambda s: hashlib.sha256(f"{seed}\x1f{s}".encode()).digest())
    few = len(ranked) < 5
    held = 0 if few else max(1, round(len(ranked) / 10))
    cuts = {"val": ranked[:held], "test": ranked[held : 2 * held], "train": ranked[2 * held :]}
    return {subject: split for split, part in cuts.items() for subject in part}  # type: ignore[misc]


def stratified_splits(strata: dict[str, tuple[int, ...]], seed: int) -> dict[str, Split]:
    """Split groups 80 : 10 : 10, each part with its share of every stratum.

    Groups are put in order of their stratum, inside it by a seeded hash, and every tenth goes to
    validation, every tenth to test. From five groups on, both get at least one; fewer all train.

    Args:
        strata: {group: what it shows}, such as its classes besides the background.
        seed: of the hash.

    Returns:
        {group: split}.
    """

    def rank(group: str) -> tuple[bool, tuple[int, ...], bytes]:
        digest = hashlib.sha256(f"{seed}\x1f{group}".encode()).digest()
        # Clean groups stand together, so that the presence of defects is balanced first.
        return bool(strata[group]), strata[group], digest

    ranked = sorted(strata, key=rank)
    count = len(ranked)
    held = max(1, round(count / 10)) if count >= 5 else 0
    splits: dict[str, Split] = dict.fromkeys(ranked, "train")
    for turn in range(held):
        splits[ranked[int((turn + 0.25) * count / held)]] = "val"
        splits[ranked[int((turn + 0.75) * count / held)]] = "test"
    return splits
