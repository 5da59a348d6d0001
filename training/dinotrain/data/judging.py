"""Readers judge every picture before anything trains on it: decoded once, on all cores."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from dinotrain.data.images import verify_image
from dinotrain.digests import digest
from dinotrain.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")
Told = Callable[[int, int], None]
"""Called with (judged, of how many) after each."""
THREADS = 8
CHECKS_TOLD = 200
"""Pictures between two words about how far reading is."""


def told_of_checks(report: Callable[[str, int, int], None]) -> Told:
    """Return what tells of the stage "check", once in ``CHECKS_TOLD`` pictures.

    A small set is read in a second, and is not worth a line.
    """

    def tell(done: int, total: int) -> None:
        if done % CHECKS_TOLD == 0 or (done == total and total > CHECKS_TOLD):
            report("check", done, total)

    return tell


class Judged(NamedTuple):
    """A picture that can be read, or why it cannot."""

    size: tuple[int, int] = (0, 0)
    """(height, width) in pixels, upright."""
    digest: str = ""
    """sha256 of the file."""
    problem: str = ""
    """Without the file's name; nothing where the picture is good."""


def judge_picture(path: Path) -> Judged:
    """Decode a picture and take its digest; every reason against it is in the answer."""
    try:
        return Judged(verify_image(path), digest(path))
    except DataError as error:
        return Judged(problem=bare(error, path))
    except OSError as error:
        return Judged(problem=f"the picture cannot be read ({error.strerror})")


def judge_all(
    judge: Callable[[Item], Result], items: Sequence[Item], progress: Told | None = None
) -> Iterator[Result]:
    """Judge items in threads, in their order.

    Decoders release the interpreter's lock, so that threads use all cores.
    """
    threads = min(THREADS, os.cpu_count() or 1)
    # Pillow's readers change the warning filters, which threads share: what they leave is undone.
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        for done, result in enumerate(pool.map(judge, items), start=1):
            if progress is not None:
                progress(done, len(items))
            yield result


def bare(error: DataError, file: Path) -> str:
    """Return the message without the file, which the list of problems names already."""
    return str(error).removeprefix(f"{file}: ").replace(str(file), file.name)
