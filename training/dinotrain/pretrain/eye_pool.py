"""A pool of rendered eyes with their geometry: what ``dense`` trains a small backbone on.

Pictures show more than the window, so that a training crop may shift. All eyes are in right
orientation, as the eyelid reader gives them.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from dinotrain.data.synthetic.eyes import GAZES, EyeSample, render_eye
from dinotrain.errors import DataError

WINDOW_MM, CROP_PX = 40.0, 224
PX_PER_MM = CROP_PX / WINDOW_MM
MARGIN_PX = 11
"""Pixels beyond the crop on each side: the crop may shift by ±2 mm."""

PICTURE_PX = CROP_PX + 2 * MARGIN_PX
CHUNK_EYES = 50
POINTS = ("reflex", "upper", "lower", "nasal", "temporal", "iris")


class EyePool(NamedTuple):
    """Rendered eyes: three gazes each, in the order of ``GAZES``.

    ``images`` (E, 3, P, P, 3) uint8 · ``classes`` (E, 3, P, P) uint8 class maps · ``points``
    (E, 3, 6, 2) float32, mm from the picture's centre, in the order of ``POINTS`` · ``labels``
    (E, 3) float32: MRD1, MRD2, LF in mm · ``subjects`` (E,) text.
    """

    images: NDArray[np.uint8]
    classes: NDArray[np.uint8]
    points: NDArray[np.float32]
    labels: NDArray[np.float32]
    subjects: NDArray[np.str_]


def _oriented(sample: EyeSample) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]], float]:
    if sample.maps is None:
        raise DataError(f"eye of {sample.subject_id} was rendered without its class maps")
    images = [sample.images[gaze] for gaze in GAZES]
    maps = [sample.maps[gaze] for gaze in GAZES]
    if sample.eye == "R":
        return images, maps, 1.0
    return [image[:, ::-1] for image in images], [plane[:, ::-1] for plane in maps], -1.0


def _render_chunk(seed: int, chunk: int, path: Path) -> Path:
    """Render one chunk into a file, in one step; a chunk already there is kept."""
    if path.exists():
        return path
    images, classes, points, labels, subjects = [], [], [], [], []
    for index in range(chunk * CHUNK_EYES, (chunk + 1) * CHUNK_EYES):
        sample = render_eye(seed, index, PICTURE_PX, PICTURE_PX / PX_PER_MM, with_maps=True)
        pictures, maps, flip = _oriented(sample)
        images.append(np.stack(pictures))
        classes.append(np.stack(maps))
        marks = [[sample.marks_mm[gaze][name] for name in POINTS] for gaze in GAZES]
        points.append(np.asarray(marks, dtype=np.float32) * np.array([flip, 1], dtype=np.float32))
        labels.append((sample.mrd1_mm, sample.mrd2_mm, sample.lf_mm))
        subjects.append(sample.subject_id)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        np.savez(
            file,
            images=np.stack(images),
            classes=np.stack(classes),
            points=np.stack(points),
            labels=np.asarray(labels, dtype=np.float32),
            subjects=np.asarray(subjects),
        )
    part.replace(path)
    return path


def _rendered(seed: int, wanted: list[tuple[int, Path]], workers: int) -> Iterator[Path]:
    """Render chunks in this process or in several, yielding each as it is done."""
    if workers < 2:
        for number, path in wanted:
            yield _render_chunk(seed, number, path)
        return
    with ProcessPoolExecutor(max_workers=workers) as executor:
        jobs = [executor.submit(_render_chunk, seed, number, path) for number, path in wanted]
        for job in as_completed(jobs):
            yield job.result()


def load_pool(
    eyes: int,
    seed: int,
    cache: Path,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> EyePool:
    """Return a pool of rendered eyes, rendering what the cache does not hold yet.

    Args:
        eyes: how many; rendered in chunks of ``CHUNK_EYES``.
        seed: of the renderer.
        cache: folder of the rendered chunks, made when missing.
        workers: processes that render.
        progress: called with (chunks done, chunks).

    Raises:
        DataError: a damaged chunk in the cache.
    """
    cache.mkdir(parents=True, exist_ok=True)
    chunks = -(-eyes // CHUNK_EYES)
    paths = [cache / f"eyes-{PICTURE_PX}-{seed}-{number:04d}.npz" for number in range(chunks)]
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    done = chunks - len(missing)
    for _ in _rendered(seed, [(number, paths[number]) for number in missing], workers):
        done += 1
        if progress is not None:
            progress(done, chunks)
    parts: list[dict[str, NDArray]] = []
    for path in paths:
        try:
            with np.load(path, allow_pickle=False) as file:
                parts.append({name: file[name] for name in EyePool._fields})
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise DataError(
                f"{path}: damaged cache file ({error}). Delete it and run again."
            ) from error
    return EyePool(*(np.concatenate([p[name] for p in parts])[:eyes] for name in EyePool._fields))
