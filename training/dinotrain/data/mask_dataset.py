"""A data set of pictures with masks: samples, classes, frequencies, and a fair split.

It is to masks what ``dataset`` is to measured values.
"""

import hashlib
from pathlib import Path

import msgspec

from dinotrain.data.dataset import Split
from dinotrain.data.images import Pixels, fit_image, read_image
from dinotrain.data.masks import Mask, fit_mask, read_mask


class MaskSample(msgspec.Struct, frozen=True, kw_only=True):
    """One picture with its mask."""

    stem: str
    """Name of both files without suffix."""
    group: str
    """Pictures of one group, such as of one part, are never in two splits."""
    split: Split
    image: Path
    image_digest: str
    """sha256 of the file."""
    mask: Path
    mask_digest: str
    """sha256 of the file."""
    size: tuple[int, int]
    """(height, width) in pixels, upright."""
    pixels: tuple[int, ...]
    """Labelled pixels per class."""
    ignored: int
    """Pixels without a label."""

    @property
    def has_defect(self) -> bool:
        """Whether any pixel is of another class than 0."""
        return any(self.pixels[1:])


class MaskDataset(msgspec.Struct, frozen=True, kw_only=True):
    """Pictures with masks; ``image_size`` is (height, width) of what ``load`` gives."""

    samples: tuple[MaskSample, ...]
    classes: tuple[str, ...]
    image_size: tuple[int, int]
    fingerprint: str
    """sha256 over classes, groups, splits and file digests; independent of paths and of order."""
    notes: tuple[str, ...] = ()
    """What is worth a look though accepted: empty classes, masks without a label, skipped files."""
    source: str = ""
    """What the data are, in a few words."""
    synthetic: bool = False

    def split(self, *names: Split) -> "MaskDataset":
        """Return the samples of some splits, with the same fingerprint."""
        chosen = tuple(sample for sample in self.samples if sample.split in names)
        return msgspec.structs.replace(self, samples=chosen)

    def class_pixels(self) -> tuple[int, ...]:
        """Labelled pixels per class over all samples, as the files have them."""
        return tuple(
            sum(sample.pixels[c] for sample in self.samples) for c in range(len(self.classes))
        )

    def class_images(self) -> tuple[int, ...]:
        """Pictures per class that show it."""
        return tuple(
            sum(sample.pixels[c] > 0 for sample in self.samples) for c in range(len(self.classes))
        )

    def class_frequencies(self) -> tuple[float, ...]:
        """Share of the labelled pixels per class; all 0 where no pixel is labelled."""
        pixels = self.class_pixels()
        return tuple(count / max(sum(pixels), 1) for count in pixels)

    def load(self, sample: MaskSample) -> tuple[Pixels, Mask]:
        """Read one picture and its mask at ``image_size``, cut to its aspect and resized.

        Returns:
            (height, width, 3) uint8, bicubic, and (height, width) uint8, nearest.

        Raises:
            DataError: a file cannot be read.
        """
        pixels = fit_image(read_image(sample.image), self.image_size)
        return pixels, fit_mask(read_mask(sample.mask), self.image_size)


def mask_fingerprint(samples: tuple[MaskSample, ...], classes: tuple[str, ...]) -> str:
    """sha256 over everything that training reads; order and paths do not count."""
    lines = sorted("\x1f".join((s.group, s.split, s.image_digest, s.mask_digest)) for s in samples)
    return hashlib.sha256("\x1e".join(["\x1f".join(classes), *lines]).encode()).hexdigest()


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
