"""Synthetic eyelid photographs whose labels are true by construction: the eyelid task's stand-in.

The cohort behind the eyelid task is private, so everything that must run anywhere (tests, the
embedded default, the demo) runs on these. A subject has one or two eyes, an eye three gazes.
Source: METHODS B2, B3, B7.
"""

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from dinotrain.data.synthetic.anatomy import GAZES, Gaze, canthi, draw_anatomy, draw_look
from dinotrain.data.synthetic.folder import claim, replace, save_png
from dinotrain.data.synthetic.paint import canvas, draw_texture, paint
from dinotrain.errors import UsageError

__all__ = ["COLUMNS", "GAZES", "MIN_SIDE_PX", "EyeSample", "Gaze", "render_eye", "write_dataset"]

Side = Literal["L", "R"]

MIN_SIDE_PX = 32
"""Fewer pixels over a window show no eye."""

COLUMNS = (
    "subject_id",
    "eye",
    "gaze",
    "path",
    "mrd1_mm",
    "mrd2_mm",
    "lf_mm",
    "px_per_mm",
    "label_step_mm",
    "split",
)
"""Columns of the manifest that ``write_dataset`` writes."""

# Streams of the seed tree: each thing drawn has one of its own, so none disturbs another.
_SUBJECT, _ANATOMY, _TEXTURE, _PICTURE, _CAMERA, _PAIR, _SPLIT = range(7)


class EyeSample(msgspec.Struct, frozen=True, kw_only=True):
    """One rendered eye.

    ``images`` are (H, W, 3) uint8 RGB. ``marks_mm`` gives per gaze the points ``reflex``,
    ``upper``, ``lower`` (margins at the reflex's primary x), ``nasal``, ``temporal`` (canthi) and
    ``iris`` (centre) as (x, y) in mm from the image centre, y downwards. ``maps`` are (H, W) uint8
    class maps (see ``paint``), only there when asked for.
    """

    subject_id: str
    eye: Side
    mrd1_mm: float
    mrd2_mm: float
    lf_mm: float
    px_per_mm: float
    images: dict[Gaze, NDArray[np.uint8]]
    marks_mm: dict[Gaze, dict[str, tuple[float, float]]]
    maps: dict[Gaze, NDArray[np.uint8]] | None = None


def _stream(seed: int, kind: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, kind, index])))


def _owner(seed: int, index: int) -> tuple[int, Side]:
    """Return the subject's number and the side of an eye; independent of how many are rendered.

    Eyes 2k and 2k + 1 are most often the two eyes of one subject.
    """
    pair = index // 2
    rng = _stream(seed, _PAIR, pair)
    if rng.random() < 0.75:
        return 2 * pair, "R" if index % 2 == 0 else "L"
    sides: tuple[Side, Side] = (
        "R" if rng.random() < 0.5 else "L",
        "R" if rng.random() < 0.5 else "L",
    )
    return index, sides[index % 2]


def render_eye(
    seed: int,
    index: int,
    image_size: int = 224,
    window_mm: float = 40.0,
    *,
    with_maps: bool = False,
) -> EyeSample:
    """Render one eye in three gazes; the same arguments give the same bytes.

    Args:
        seed: of the whole set, 0 or more.
        index: which eye of the set, 0 or more.
        image_size: side of the square images in pixels.
        window_mm: side of the field of view in mm, centred on the canthi to within 1 mm.
        with_maps: also return a class map per gaze.

    Raises:
        UsageError: a negative seed or index, or a size that cannot show an eye.
    """
    if seed < 0 or index < 0:
        raise UsageError(f"seed {seed} and eye index {index}: both must be 0 or more")
    if image_size < MIN_SIDE_PX or not 30 <= window_mm <= 100:
        raise UsageError(
            f"cannot render {image_size} pixels over {window_mm} mm. "
            f"Use at least {MIN_SIDE_PX} pixels and a window of 30 to 100 mm."
        )
    subject, side = _owner(seed, index)
    look = draw_look(_stream(seed, _SUBJECT, subject))
    eye = draw_anatomy(_stream(seed, _ANATOMY, index), look)
    px_per_mm = image_size / window_mm
    grid = canvas(image_size, px_per_mm)
    texture = draw_texture(_stream(seed, _TEXTURE, index), grid, look)
    flip = -1.0 if side == "L" else 1.0
    images: dict[Gaze, NDArray[np.uint8]] = {}
    marks: dict[Gaze, dict[str, tuple[float, float]]] = {}
    maps: dict[Gaze, NDArray[np.uint8]] = {}
    lowest = eye.poses["down"].upper_mm - eye.poses["primary"].upper_mm
    for number, gaze in enumerate(GAZES):
        pose = eye.poses[gaze]
        picture, classes = paint(
            _stream(seed, _PICTURE, 3 * index + number),
            grid,
            look,
            eye,
            pose,
            texture,
            gaze_drop=min(lowest / 8, 1.0) if gaze == "down" else 0.0,
        )
        nasal, temporal = canthi(look, eye, pose)
        anchor = pose.centre_mm[0] + eye.anchor_x_mm
        points = {
            "reflex": pose.reflex_mm,
            "upper": (anchor, pose.upper_mm),
            "lower": (anchor, pose.lower_mm),
            "nasal": nasal,
            "temporal": temporal,
            "iris": pose.iris_mm,
        }
        marks[gaze] = {name: (flip * x, y) for name, (x, y) in points.items()}
        mirror = slice(None, None, -1 if side == "L" else 1)
        images[gaze] = np.ascontiguousarray(picture[:, mirror])
        maps[gaze] = np.ascontiguousarray(classes[:, mirror])
    return EyeSample(
        subject_id=f"s{subject:06d}",
        eye=side,
        mrd1_mm=eye.mrd1_mm,
        mrd2_mm=eye.mrd2_mm,
        lf_mm=eye.lf_mm,
        px_per_mm=px_per_mm,
        images=images,
        marks_mm=marks,
        maps=maps if with_maps else None,
    )


def _camera(seed: int, subject: int) -> tuple[int, float]:
    """Return image size in pixels and field in mm of a subject's camera: never the exact window."""
    rng = _stream(seed, _CAMERA, subject)
    size = int(rng.integers(232, 329))
    return size, round(float(rng.uniform(42.5, 48.0)), 3)


def _splits(seed: int, subjects: list[int]) -> dict[int, str]:
    """Split subjects 80/10/10; with five or more subjects no part is empty."""
    order = _stream(seed, _SPLIT, 0).permutation(len(subjects))
    held = max(1, round(0.1 * len(subjects))) if len(subjects) >= 5 else 0
    names = ["val"] * held + ["test"] * held + ["train"] * (len(subjects) - 2 * held)
    return {subjects[int(place)]: name for place, name in zip(order, names, strict=True)}


def write_dataset(
    count: int,
    seed: int,
    out: Path,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Render a dataset of eyes into a folder: ``images/*.png``, then ``manifest.csv``.

    The manifest comes last and in one step, so that it never names a file that is not there; a
    run that was cut off can simply be started again.

    Args:
        count: number of eyes, three images each.
        seed: of the whole set; the same seed and count give the same bytes.
        out: a folder that is new, empty or holds this same dataset.
        progress: called with (eyes done, count) after each eye.

    Returns:
        The manifest's path.

    Raises:
        DataError: ``out`` holds something else.
        UsageError: a count below 1 or a negative seed.

    Source: METHODS B3.
    """
    if count < 1 or seed < 0:
        raise UsageError(f"count {count} and seed {seed}: count must be 1 or more, seed 0 or more")
    manifest = out / "manifest.csv"
    claim(out, generator="dinotrain eyes 1", count=count, seed=seed)
    owners = [_owner(seed, index) for index in range(count)]
    split = _splits(seed, sorted({subject for subject, _ in owners}))
    rows: list[tuple[object, ...]] = []
    for index, (subject, side) in enumerate(owners):
        size, field_mm = _camera(seed, subject)
        sample = render_eye(seed, index, size, field_mm)
        for gaze in GAZES:
            name = f"images/{sample.subject_id}_{side}_{gaze}.png"
            save_png(sample.images[gaze], out / name)
            labels = (f"{v:.4f}" for v in (sample.mrd1_mm, sample.mrd2_mm, sample.lf_mm))
            scale = f"{sample.px_per_mm:.6f}"
            rows.append((sample.subject_id, side, gaze, name, *labels, scale, "", split[subject]))
        if progress is not None:
            progress(index + 1, count)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    replace(manifest, text.getvalue().encode())
    return manifest
