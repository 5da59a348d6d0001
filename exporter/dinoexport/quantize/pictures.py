"""The pictures that a model is calibrated on: the task's own, counted, seeded, known by a digest.

They come from the training split of labelled data, from a folder or a list of pictures, or, where
the user gives nothing, from the task's own renderer.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinoexport.quantize.calibration import CalibrationSet
from dinotrain.data.class_folder import SUFFIXES
from dinotrain.data.images import Pixels, fit_image, read_image
from dinotrain.errors import DataError, UsageError
from dinotrain.tasks.base import Task

DEFAULT_COUNT = 64
LEAST_COUNT = 8
"""Below this, one odd picture sets the ranges."""
LIST_SUFFIX = ".txt"
_RENDER_SEED = 77_000_000
"""Added to the user's seed: far from the seeds of parity samples and of rendered data sets."""
_Named = Iterator[tuple[str, dict[str, Pixels]]]


def read_calibration_set(
    task: Task,
    image_size: tuple[int, int],
    path: Path | None = None,
    *,
    count: int = DEFAULT_COUNT,
    seed: int = 0,
    barred: Collection[str] = (),
) -> CalibrationSet:
    """Read the pictures to calibrate on.

    Args:
        task: reads labelled data, and renders where there is no path.
        image_size: (height, width) of the model.
        path: a folder with pictures in it, or a text file with the path of one on each line (from
            its own folder): each serves all inputs of the task in turn. Otherwise labelled data as
            the task reads them, of which the training split is taken. None: rendered pictures.
        count: samples at most; those there are, drawn by ``seed``.
        seed: of the choice.
        barred: digests of pictures that must not be among them (``pixel_digest``): the parity
            samples, whose error would look smaller than that of new pictures.

    Raises:
        UsageError: fewer than ``LEAST_COUNT`` are asked for or found.
        DataError: the data cannot be read; a picture is of one colour or barred.
    """
    if count < LEAST_COUNT:
        raise UsageError(
            f"--calibration-count {count} is under {LEAST_COUNT}, of which one odd picture sets "
            f"the ranges. Use {LEAST_COUNT} or more; {DEFAULT_COUNT} is usual."
        )
    if path is None:
        source = f"pictures rendered by task {task.name}; none were given"
        found = _rendered(task, image_size, count, seed)
    elif _is_plain(path):
        source, found = path.name, _listed(task, image_size, path, count, seed)
    else:
        source, found = (
            f"{path.name}, training split",
            _labelled(task, image_size, path, count, seed),
        )
    samples = []
    for name, sample in found:
        _check_pictures(name, sample, barred)
        samples.append(sample)
    if len(samples) < LEAST_COUNT:
        raise UsageError(
            f"--calibration {path}: {len(samples)} samples with all of the task's pictures; "
            f"{LEAST_COUNT} are needed at least. Give more, or leave --calibration out to render."
        )
    return CalibrationSet(tuple(samples), source, seed, set_digest(samples))


def pixel_digest(image: NDArray[np.uint8]) -> str:
    """sha256 of a picture's size and pixels, as hex."""
    shape = "x".join(map(str, image.shape)).encode()
    return hashlib.sha256(shape + b"\x1f" + np.ascontiguousarray(image).tobytes()).hexdigest()


def set_digest(samples: "list[dict[str, Pixels]]") -> str:
    """sha256 over the inputs' names and pixels of all samples, in order, as hex."""
    lines = [f"{name}={pixel_digest(s[name])}" for s in samples for name in sorted(s)]
    return hashlib.sha256("\x1e".join(lines).encode()).hexdigest()


def _rendered(task: Task, image_size: tuple[int, int], count: int, seed: int) -> _Named:
    for index, sample in enumerate(task.render_samples(count, image_size, _RENDER_SEED + seed)):
        yield f"rendered sample {index}", sample


def _is_plain(path: Path) -> bool:
    """True for pictures without labels; a labelled folder holds folders or a manifest."""
    if path.suffix.lower() == LIST_SUFFIX:
        return True
    return path.is_dir() and bool(_pictures_in(path))


def _pictures_in(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    )


def _listed(task: Task, image_size: tuple[int, int], path: Path, count: int, seed: int) -> _Named:
    files = _read_list(path) if path.suffix.lower() == LIST_SUFFIX else _pictures_in(path)
    chosen = [files[i] for i in _draw(len(files), count, seed)]
    if len(chosen) < LEAST_COUNT:
        # Before any is read: the caller refuses by what it counts.
        return
    pixels = [fit_image(read_image(file), image_size) for file in chosen]
    names = [i.name for i in task.inputs]
    for start, file in enumerate(chosen):
        turn = {name: pixels[(start + k) % len(pixels)] for k, name in enumerate(names)}
        yield str(file), turn


def _read_list(path: Path) -> list[Path]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"--calibration {path}: cannot be read as a list of pictures ({error}). "
            "Give a text file with a path on each line."
        ) from error
    return [path.parent / line.strip() for line in lines if line.strip()]


def _labelled(task: Task, image_size: tuple[int, int], path: Path, count: int, seed: int) -> _Named:
    dataset = task.read(path, image_size=image_size, seed=seed).split("train")
    names = {i.name for i in task.inputs}
    whole = [sample for sample in dataset.samples if names <= sample.images.keys()]
    for index in _draw(len(whole), count, seed):
        pixels, _ = task.load(whole[index], image_size)
        yield whole[index].name, pixels


def _draw(available: int, count: int, seed: int) -> list[int]:
    order = np.random.Generator(np.random.PCG64(seed)).permutation(available)
    return order[:count].tolist()


def _check_pictures(name: str, sample: Mapping[str, Pixels], barred: Collection[str]) -> None:
    for role, pixels in sample.items():
        if bool((pixels == pixels[:1, :1]).all()):
            raise DataError(
                f"--calibration: the {role} of {name} has one colour, {pixels[0, 0].tolist()}, "
                "everywhere, and shows no layer anything. Take it out."
            )
        if pixel_digest(pixels) in barred:
            raise DataError(
                f"--calibration: the {role} of {name} is one of the pictures that parity is judged "
                "on, whose errors would come out too small. Take it out."
            )
