"""The pictures that a model is calibrated on: the task's own, counted, seeded, known by a digest.

They come from the training split of labelled data, from a folder or a list of pictures, or, where
the user gives nothing, from the task's own renderer.
"""

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinoexport.quantize.calibration import CalibrationSet
from dinotrain.data.class_folder import SUFFIXES
from dinotrain.data.images import Pixels, fit_image, read_image
from dinotrain.errors import DataError, UsageError
from dinotrain.tasks.base import Task

USUAL_PICTURES = 64
"""Each is of one input: of several inputs a sample has several, which one backbone reads."""
LEAST_COUNT = 8
"""Below this, one odd picture sets the ranges."""
LIST_SUFFIX = ".txt"
_HELD_OUT_SEED = 500_000
_RENDER_SEED = 77_000_000
"""Added to the user's seed: far from the seeds of parity samples and of rendered data sets."""
_Named = Iterator[tuple[str, dict[str, Pixels]]]


def read_calibration_set(
    task: Task,
    image_size: tuple[int, int],
    path: Path | None = None,
    *,
    count: int | None = None,
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
        count: samples at most; those there are, drawn by ``seed``. None: ``usual_count``.
        seed: of the choice.
        barred: digests of pictures that must not be among them (``pixel_digest``): the parity
            samples, whose error would look smaller than that of new pictures.

    Raises:
        UsageError: fewer than ``LEAST_COUNT`` are asked for or found.
        DataError: the data cannot be read; a picture is of one colour or barred.
    """
    count = usual_count(task) if count is None else count
    if count < LEAST_COUNT:
        raise UsageError(
            f"--calibration-count {count} is under {LEAST_COUNT}, of which one odd picture sets "
            f"the ranges. Use {LEAST_COUNT} or more; {usual_count(task)} is usual."
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


def usual_count(task: Task) -> int:
    """Return how many samples hold ``USUAL_PICTURES``."""
    return max(LEAST_COUNT, math.ceil(USUAL_PICTURES / len(task.inputs)))


@dataclass(frozen=True)
class HeldOut:
    """Pictures that no weight, range or choice of a recipe has seen.

    Attributes:
        samples: {input: (H, W, 3) uint8} each.
        true: what ``Task.truth`` gives for them; None where they have no labels.
        source: what they were read from, in a few words.
        sha256: over their pixels, in order.
    """

    samples: tuple[dict[str, Pixels], ...]
    true: NDArray[np.generic] | None
    source: str
    sha256: str


def read_held_out(
    task: Task,
    image_size: tuple[int, int],
    calibration: CalibrationSet,
    path: Path | None = None,
    *,
    count: int,
) -> HeldOut:
    """Read pictures to judge quantised models on, beside those that they were calibrated on.

    Args:
        task: reads labelled data, and renders where there is no path.
        image_size: (height, width) of the model.
        calibration: whose pictures must not be among them, and whose seed is gone on with.
        path: as in ``read_calibration_set``. Of labelled data the test split is taken, or
            validation where there is none; of a folder or a list the pictures that calibration
            left; without a path others are rendered.
        count: samples at most.

    Raises:
        UsageError: fewer than ``LEAST_COUNT`` are left.
        DataError: the data cannot be read.
    """
    seed, true = calibration.seed, None
    if path is None:
        samples = task.render_samples(count, image_size, _RENDER_SEED + _HELD_OUT_SEED + seed)
        source = f"pictures rendered by task {task.name}"
    elif _is_plain(path):
        taken = len(calibration.samples)
        found = _listed(task, image_size, path, taken + count, seed)
        samples = [sample for _, sample in found][taken:]
        source = f"{path.name}, beside calibration"
    else:
        dataset = task.read(path, image_size=image_size, seed=seed)
        split = "test" if dataset.split("test").samples else "val"
        names = {i.name for i in task.inputs}
        whole = [s for s in dataset.split(split).samples if names <= s.images.keys()]
        chosen = [whole[index] for index in _draw(len(whole), count, seed)]
        samples = [task.load(sample, image_size)[0] for sample in chosen]
        true = task.truth(chosen, image_size)
        source = f"{path.name}, {split} split"
    if len(samples) < LEAST_COUNT:
        raise UsageError(
            f"--calibration {path}: {len(samples)} samples are left to judge recipes on, "
            f"{LEAST_COUNT} are needed. Give more pictures or a smaller --calibration-count."
        )
    seen = {pixel_digest(image) for sample in calibration.samples for image in sample.values()}
    # Calibration takes pictures of a list in turn for all inputs, so one may stand in both.
    apart = [not seen & {pixel_digest(image) for image in s.values()} for s in samples]
    samples = [sample for sample, new in zip(samples, apart, strict=True) if new]
    if len(samples) < LEAST_COUNT:
        raise UsageError(
            f"--calibration {path}: only {len(samples)} of the held-out samples are not among "
            f"those of calibration; {LEAST_COUNT} are needed. Give more pictures."
        )
    kept = None if true is None else true[np.array(apart)]
    return HeldOut(tuple(samples), kept, source, set_digest(samples))


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
