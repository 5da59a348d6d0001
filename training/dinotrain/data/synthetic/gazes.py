"""A rendered data set of classes: in which direction an eye looks.

One picture per eye, so that no class can be told from another picture of the same eye.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinotrain.data.dataset import assign_splits
from dinotrain.data.synthetic.eyes import GAZES, render_eye
from dinotrain.data.synthetic.folder import claim, save_png
from dinotrain.errors import UsageError

IMAGE_PX = 224


def render_gaze(seed: int, index: int, image_size: int = IMAGE_PX) -> tuple[NDArray[np.uint8], str]:
    """Render one eye in one gaze; the same arguments give the same bytes.

    Args:
        seed: of the whole set, 0 or more.
        index: which picture of the set; gazes take turns.
        image_size: side of the square picture in pixels.

    Returns:
        (image_size, image_size, 3) uint8, and the name of its class.
    """
    gaze = GAZES[index % len(GAZES)]
    return render_eye(seed, index, image_size).images[gaze], gaze


def write_dataset(
    count: int, seed: int, out: Path, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Render a folder per split and class, which ``read_class_folder`` reads.

    Args:
        count: number of pictures.
        seed: of the whole set; the same seed and count give the same bytes.
        out: a folder that is new, empty or holds this same dataset.
        progress: called with (pictures done, count) after each one.

    Returns:
        ``out``.

    Raises:
        DataError: ``out`` holds something else.
        UsageError: too few to have every gaze in every split, or a negative seed.
    """
    least = 10 * len(GAZES)
    if count < least or seed < 0:
        raise UsageError(
            f"count {count} and seed {seed}: count must be {least} or more, seed 0 or more"
        )
    claim(out, generator="dinotrain gazes 1", count=count, seed=seed)
    # Eyes 2k and 2k + 1 may be one person's: they go into one split.
    pairs = [str(index) for index in range((count + 1) // 2)]
    splits = assign_splits(pairs, seed)
    for index in range(count):
        image, gaze = render_gaze(seed, index)
        save_png(image, out / splits[str(index // 2)] / gaze / f"{index:06d}.png")
        if progress is not None:
            progress(index + 1, count)
    return out
