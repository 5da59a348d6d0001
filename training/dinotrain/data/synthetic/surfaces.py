"""Synthetic metal surfaces with dust, runs of coating and scratches, and exact masks.

The segmentation task's stand-in for pictures from a production line: what must run anywhere (tests,
the embedded example, the demo) runs on these. Pictures of one part share its metal and finish.
Source: METHODS C, Classes.
"""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinotrain.data.dataset import stratified_splits
from dinotrain.data.synthetic.flaws import CLASSES, DUST, RUNDOWN, SCRATCH, lay_flaws
from dinotrain.data.synthetic.folder import claim, replace, save_png
from dinotrain.data.synthetic.light import draw_shot, expose, exposure, shine
from dinotrain.data.synthetic.metal import FIELD_MM, Finish, draw_plate, draw_surface, grid_of
from dinotrain.errors import UsageError

__all__ = ["CLASSES", "MIN_SIDE_PX", "SurfaceSample", "render_surface", "write_dataset"]

MIN_SIDE_PX = 64
"""Fewer pixels over the field show no scratch."""

DEFAULT_SIZE = 518

# Streams of the seed tree: each thing drawn has one of its own, so none disturbs another.
_PLATE, _SURFACE, _SHOT, _FLAWS, _SHOWN, _SENSOR, _PARTS = range(7)

# Which defects a picture shows, and how often; a fifth of the pictures is flawless.
_MIXES: tuple[tuple[frozenset[int], float], ...] = (
    (frozenset(), 0.20),
    (frozenset({DUST}), 0.16),
    (frozenset({RUNDOWN}), 0.16),
    (frozenset({SCRATCH}), 0.18),
    (frozenset({DUST, SCRATCH}), 0.10),
    (frozenset({DUST, RUNDOWN}), 0.08),
    (frozenset({RUNDOWN, SCRATCH}), 0.06),
    (frozenset({DUST, RUNDOWN, SCRATCH}), 0.06),
)

# Colours of the indexed masks, for people who open them: dark, yellow, blue, red; ignored is grey.
_PALETTE = {
    0: (24, 24, 28),
    1: (240, 200, 40),
    2: (60, 140, 230),
    3: (230, 60, 60),
    255: (128,) * 3,
}


class SurfaceSample(msgspec.Struct, frozen=True, kw_only=True):
    """One rendered picture: ``image`` (H, W, 3) uint8 RGB, ``mask`` (H, W) uint8 class ids."""

    part: str
    finish: Finish
    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]


def _stream(seed: int, kind: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, kind, index])))


def _part(seed: int, index: int) -> int:
    """Return the number of a picture's part; independent of how many are rendered.

    Pictures 2k and 2k + 1 show one part more often than not.
    """
    pair = index // 2
    return 2 * pair if _stream(seed, _PARTS, pair).random() < 0.6 else index


def render_surface(
    seed: int,
    index: int,
    size: int = DEFAULT_SIZE,
    *,
    field_mm: float = FIELD_MM,
    flawless: bool = False,
) -> SurfaceSample:
    """Render one picture of a metal surface; the same arguments give the same bytes.

    Args:
        seed: of the whole set, 0 or more.
        index: which picture of the set, 0 or more.
        size: side of the square picture in pixels; defects keep their size in mm, but are never
            thinner than the mask can show.
        field_mm: width of what the picture shows; a smaller one shows larger defects.
        flawless: leave out the defects and nothing else, for comparison.

    Raises:
        UsageError: a negative seed or index, or a size or field that cannot show a scratch.
    """
    if seed < 0 or index < 0:
        raise UsageError(f"seed {seed} and picture index {index}: both must be 0 or more")
    if size < MIN_SIDE_PX or not 15 <= field_mm <= 100:
        raise UsageError(
            f"cannot render {size} pixels over {field_mm} mm. "
            f"Use at least {MIN_SIDE_PX} pixels and a field of 15 to 100 mm."
        )
    part = _part(seed, index)
    plate = draw_plate(_stream(seed, _PLATE, part))
    grid = grid_of(size, field_mm)
    surface = draw_surface(_stream(seed, _SURFACE, index), grid, plate)
    shot = draw_shot(_stream(seed, _SHOT, index))
    # A camera sets its exposure on the part, whatever lies on it.
    gain = exposure(shine(surface, grid, shot), shot)
    shown = frozenset[int]() if flawless else _shown(seed, index)
    mask = lay_flaws(_stream(seed, _FLAWS, index), grid, plate, surface, shown)
    image = expose(_stream(seed, _SENSOR, index), shine(surface, grid, shot), grid, shot, gain)
    return SurfaceSample(part=f"p{part:06d}", finish=plate.finish, image=image, mask=mask)


def _shown(seed: int, index: int) -> frozenset[int]:
    """Return the classes of a picture."""
    place = _stream(seed, _SHOWN, index).random()
    total = 0.0
    for mix, share in _MIXES:
        total += share
        if place < total:
            return mix
    return _MIXES[-1][0]


def write_dataset(
    count: int,
    seed: int,
    out: Path,
    progress: Callable[[int, int], None] | None = None,
    *,
    size: int = DEFAULT_SIZE,
    field_mm: float = FIELD_MM,
) -> Path:
    """Render a data set: ``images``, ``masks``, ``classes.json``, then ``split.csv``.

    The split comes last and in one step, so that it never names a file that is not there; a run
    that was cut off can simply be started again.

    Args:
        count: number of pictures.
        seed: of the whole set; the same arguments give the same bytes.
        out: a folder that is new, empty or holds this same data set.
        progress: called with (pictures done, count) after each picture.
        size: side of the square pictures in pixels.
        field_mm: width of what a picture shows.

    Returns:
        The folder, which ``read_mask_folder`` reads.

    Raises:
        DataError: ``out`` holds something else.
        UsageError: a count below 1, a negative seed, or a size or field out of range.
    """
    if count < 1 or seed < 0:
        raise UsageError(f"count {count} and seed {seed}: count must be 1 or more, seed 0 or more")
    claim(
        out, generator="dinotrain surfaces 1", count=count, seed=seed, size=size, field_mm=field_mm
    )
    parts: dict[str, str] = {}
    strata: dict[str, set[int]] = {}
    for index in range(count):
        sample = render_surface(seed, index, size, field_mm=field_mm)
        stem = f"surface_{index:06d}"
        save_png(sample.image, out / "images" / f"{stem}.png")
        _save_mask(sample.mask, out / "masks" / f"{stem}.png")
        parts[stem] = sample.part
        shown = set(np.unique(sample.mask).tolist()) - {0}
        strata.setdefault(sample.part, set()).update(shown)
        if progress is not None:
            progress(index + 1, count)
    replace(out / "classes.json", json.dumps(CLASSES).encode())
    splits = stratified_splits({p: tuple(sorted(shown)) for p, shown in strata.items()}, seed)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("stem", "group", "split"))
    writer.writerows((stem, part, splits[part]) for stem, part in parts.items())
    replace(out / "split.csv", text.getvalue().encode())
    return out


def _save_mask(mask: NDArray[np.uint8], path: Path) -> None:
    """Write a mask as an indexed PNG, whose colours show it to people."""
    image = Image.fromarray(mask)
    # A palette turns greyscale into indexed and leaves the ids.
    image.putpalette([value for c in range(256) for value in _PALETTE.get(c, (0, 0, 0))])
    data = io.BytesIO()
    image.save(data, "PNG", compress_level=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, data.getvalue())
