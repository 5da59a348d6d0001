"""The samples that a section shows: how they are named, and what stands in for a lost picture."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinotrain.errors import DinoError, ShapeError
from dinotrain.report.pictures import Pixels, sample_strip
from dinotrain.report.text import shorten

Load = Callable[[int], dict[str, Pixels]]
"""Number of a sample → {input: (H, W, 3) uint8}."""

SHOWN = 6
_NAME_COLUMNS = 60


def check_rows(what: str, rows: int, names: Sequence[str]) -> None:
    """Refuse predictions that do not belong to the samples.

    Raises:
        ShapeError: counts differ.
    """
    if rows != len(names):
        raise ShapeError(f"{what} has {rows} rows and there are {len(names)} names; one row each")


def worst(errors: NDArray[np.float64], limit: int = SHOWN) -> list[int]:
    """Numbers of the samples with the largest errors, largest first; NaN are left out."""
    order = np.argsort(np.where(np.isnan(errors), -np.inf, errors), kind="stable")[::-1]
    return [int(index) for index in order[:limit] if not np.isnan(errors[index])]


def strip_of(index: int, names: Sequence[str], load: Load) -> tuple[Image.Image, str]:
    """Pictures of a sample and its name; a picture that is gone must not cost the report."""
    images, name = load_or_say(index, names, load)
    return sample_strip(images), name


def load_or_say(index: int, names: Sequence[str], load: Load) -> tuple[dict[str, Pixels], str]:
    """Return the pictures of a sample and its name, or none and a name that says so."""
    name = shorten(names[index], _NAME_COLUMNS)
    try:
        return load(index), name
    except DinoError:
        return {}, f"{name} (its picture cannot be read)"
