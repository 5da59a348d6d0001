"""The folder of a rendered data set: stamped with what it is, written so that it can be resumed."""

import io
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinotrain.data.origin import STAMP
from dinotrain.errors import DataError


def claim(out: Path, **facts: Any) -> None:
    """Make a folder ours and write its stamp.

    Args:
        out: a folder that is new, empty, or has a stamp of the same facts.
        facts: what fixes every byte of the set: generator, count, seed.

    Raises:
        DataError: ``out`` is a file, or holds anything else.
    """
    stamp, identity = out / STAMP, msgspec.json.encode(facts)
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file. Give a folder to write the dataset to.")
    ours = stamp.is_file() and stamp.read_bytes() == identity
    if out.is_dir() and any(out.iterdir()) and not ours:
        raise DataError(
            f"{out} is not empty and does not hold this dataset (other files, count or seed). "
            "Give a new or empty folder."
        )
    out.mkdir(parents=True, exist_ok=True)
    replace(stamp, identity)


def save_png(image: NDArray[np.uint8], path: Path) -> None:
    """Write a picture in one step, its folder made."""
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG", compress_level=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, data.getvalue())


def replace(path: Path, data: bytes) -> None:
    """Write a file in one step."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)
