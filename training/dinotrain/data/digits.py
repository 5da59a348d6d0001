"""scikit-learn's handwritten digits as a folder per class: real pictures without a download.

1,797 scans of 8×8 cells, a part of UCI's "Optical Recognition of Handwritten Digits" (CC BY 4.0).
They make a probe's figure comparable between machines; who wrote which digit is not known, so the
splits may share writers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinotrain.data.dataset import assign_splits
from dinotrain.data.synthetic.folder import claim, save_png

SOURCE = "scikit-learn's handwritten digits"
IMAGE_PX = 112
INK = 16
"""Largest value of a cell."""


def upscale(cells: NDArray, image_size: int = IMAGE_PX) -> NDArray[np.uint8]:
    """Make a picture of one digit, white on black.

    Args:
        cells: (8, 8), 0 for paper up to 16 for ink.
        image_size: side of the square picture in pixels.

    Returns:
        (image_size, image_size, 3) uint8, bicubic.
    """
    grey = Image.fromarray(np.rint(np.asarray(cells) * (255 / INK)).astype(np.uint8))
    large = grey.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return np.array(large.convert("RGB"))


def write_digits(out: Path, progress: Callable[[int, int], None] | None = None) -> Path:
    """Write a folder per split and class, which ``read_class_folder`` reads; always the same bytes.

    Args:
        out: a folder that is new, empty or holds this same dataset. Digits are split 80 : 10 : 10,
            class by class.
        progress: called with (pictures done, count) after each one.

    Returns:
        ``out``.

    Raises:
        DataError: ``out`` holds something else.
    """
    # scikit-learn takes a second to import.
    from sklearn.datasets import load_digits

    digits = cast(Any, load_digits())
    count = len(digits.target)
    claim(out, source=SOURCE, writer="dinotrain digits 1", count=count)
    splits: dict[str, str] = {}
    for digit in range(10):
        splits |= assign_splits([str(index) for index in np.flatnonzero(digits.target == digit)], 0)
    for index, (cells, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        save_png(upscale(cells), out / splits[str(index)] / str(digit) / f"{index:04d}.png")
        if progress is not None:
            progress(index + 1, count)
    return out
