"""Turn a synthetic eye's measures into pixels: layers from the skin up, then a camera.

Every layer is a signed distance in millimetres turned into coverage, so edges are antialiased and
stand exactly where the labels say at any resolution. All arithmetic runs on one thread and ends in
rounded 8-bit values.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from dinotrain.data.synthetic.anatomy import Anatomy, Array, Look, Pose, Rgb, margins

SKIN, SCLERA, IRIS, PUPIL, CARUNCLE, BROW = range(6)
"""Classes of the class map; lashes and reflex are not marked, for they hide no boundary."""

# Hairs are drawn this many times larger and averaged, for Pillow's lines have no soft edge.
_HAIR_SCALE = 3


class Canvas(NamedTuple):
    """The pixel grid in mm of the image frame: x (1, W), y (H, 1)."""

    x: Array
    y: Array
    px_per_mm: float

    @property
    def size(self) -> int:
        """Side of the square image in pixels."""
        return self.x.shape[1]


class Texture(NamedTuple):
    """What the three pictures of one eye share, (H, W) each, about zero with unit spread."""

    blotches: Array
    pores: Array
    veins: Array
    iris: Array
    brow: Array


def canvas(size: int, px_per_mm: float) -> Canvas:
    """Return the pixel centres of a square image."""
    line = ((np.arange(size) + 0.5 - size / 2) / px_per_mm).astype(np.float32)
    return Canvas(line[None, :], line[:, None], px_per_mm)


def _field(rng: np.random.Generator, cells: int, size: int) -> Array:
    """Return smooth noise: a random grid of ``cells`` enlarged to ``size``."""
    grid = rng.standard_normal((cells, cells), dtype=np.float32)
    big = Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(big, dtype=np.float32)


def _bump(distance: Array, width: float) -> Array:
    return np.exp(-np.square(distance / width))


def _step(distance: Array, px_per_mm: float) -> Array:
    """Return coverage 0..1 of a signed distance in mm, one pixel wide."""
    return np.clip(distance * px_per_mm + 0.5, 0, 1)


def _ramp(value: Array, low: float, high: float) -> Array:
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _lay(image: Array, colour: Array | Rgb, cover: Array) -> None:
    """Blend a colour over the image in place by its coverage."""
    image += (np.asarray(colour, dtype=np.float32) - image) * cover[..., None]


def _darker(colour: Rgb, factor: float) -> Rgb:
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


def _box(grid: Canvas, upper: Array, lower: Array, within: Array) -> tuple[slice, slice]:
    """Return rows and columns that hold the opening and its rims."""
    columns = np.flatnonzero(within[0] > -0.5)
    between = slice(int(columns[0]), int(columns[-1]) + 1)
    top, bottom = float(upper[:, between].min()) - 1.5, float(lower[:, between].max()) + 1.5
    rows = np.flatnonzero((grid.y[:, 0] >= top) & (grid.y[:, 0] <= bottom))
    return slice(int(rows[0]), int(rows[-1]) + 1), between


class _Hairs:
    """A mask of hairs drawn as polylines in millimetres."""

    def __init__(self, grid: Canvas) -> None:
        side = grid.size * _HAIR_SCALE
        self._scale = grid.px_per_mm * _HAIR_SCALE
        self._middle = side / 2
        self._mask = Image.new("L", (side, side))
        self._draw = ImageDraw.Draw(self._mask)

    def stroke(self, points: list[tuple[float, float]], width_mm: float, ink: int) -> None:
        """Draw one hair that thins towards its end."""
        scaled = [
            (x * self._scale + self._middle, y * self._scale + self._middle) for x, y in points
        ]
        parts = len(scaled) - 1
        for i in range(parts):
            width = max(round(width_mm * self._scale * (1 - 0.8 * i / parts)), 1)
            self._draw.line((*scaled[i], *scaled[i + 1]), fill=ink, width=width)

    def cover(self) -> Array:
        """Return the coverage (H, W) in 0..1."""
        small = self._mask.reduce(_HAIR_SCALE)
        return np.asarray(small, dtype=np.float32) / 255


def _veins(rng: np.random.Generator, grid: Canvas, redness: float) -> Array:
    hairs = _Hairs(grid)
    for _ in range(int(6 + 26 * redness)):
        side = 1.0 if rng.random() < 0.5 else -1.0
        x, y = side * rng.uniform(9, 15), rng.uniform(-9, 6)
        heading = rng.normal(0, 0.35)
        points = [(x, y)]
        for _ in range(int(rng.integers(4, 9))):
            heading += rng.normal(0, 0.45)
            x, y = x - side * 0.9 * math.cos(heading), y + 0.9 * math.sin(heading)
            points.append((x, y))
        hairs.stroke(points, rng.uniform(0.06, 0.16), int(rng.integers(60, 190)))
    return hairs.cover()


def _brow(rng: np.random.Generator, grid: Canvas, look: Look) -> Array:
    hairs = _Hairs(grid)
    thick = look.brow_thickness_mm
    for _ in range(int(170 + 480 * look.brow_density)):
        along = rng.uniform(-1, 1)
        x = along * 21.0
        taper = 0.35 + 0.65 * min(1.0, 1.15 * (1 + along))
        middle = -look.brow_mm - 2.2 * (1 - ((along + 0.25) / 1.25) ** 2) + 1.5
        y = middle + rng.normal(0, 0.28) * thick * taper
        # Nasal hairs stand up, temporal hairs lie along the brow.
        lean = (1.35 if along > 0.6 else 0.45 + 0.5 * max(along, 0)) * rng.uniform(0.6, 1.2)
        length = rng.uniform(2.5, 5.5) * (0.7 + 0.3 * taper)
        dx, dy = -length * math.cos(lean), -length * math.sin(lean)
        bend = rng.normal(0.12, 0.1) * length
        points = [(x, y), (x + dx / 2, y + dy / 2 - bend), (x + dx, y + dy + bend * 0.3)]
        hairs.stroke(points, rng.uniform(0.12, 0.26), int(rng.integers(120, 240)))
    return hairs.cover()


def _iris_table(rng: np.random.Generator) -> Array:
    """Return streaks by (radius, angle): 24 × 192, about zero."""
    fine = rng.standard_normal((24, 192)).astype(np.float32)
    fibres = ndimage.gaussian_filter(fine, (5.0, 0.8), mode="wrap") * 4.5
    clouds = ndimage.gaussian_filter(fine, (3.0, 7.0), mode="wrap") * 9.0
    return (fibres + 0.7 * clouds).astype(np.float32)


def draw_texture(rng: np.random.Generator, grid: Canvas, look: Look) -> Texture:
    """Draw what stays the same from picture to picture of one eye."""
    size = grid.size
    blotches = _field(rng, 5, size) + 0.6 * _field(rng, 13, size)
    pores = 0.7 * _field(rng, 44, size) + 0.7 * _field(rng, 110, size)
    veins = _veins(rng, grid, look.redness)
    table = _iris_table(rng)
    return Texture(blotches, pores, veins, table, _brow(rng, grid, look))


def _paint_skin(
    grid: Canvas, look: Look, eye: Anatomy, pose: Pose, texture: Texture, upper: Array, lower: Array
) -> Array:
    x, y = grid.x, grid.y
    half = look.width_mm / 2
    cx, cy = pose.centre_mm
    above, below = upper - y, y - lower
    fade = _ramp(half + 3.5 - np.abs(x - cx), 0, 6)
    inner = _ramp(half + 1.0 - np.abs(x - cx), 0, 7)

    crease = above - pose.crease_above_mm * (0.3 + 0.7 * inner)
    depth = look.crease_depth
    light = 1 - 0.34 * depth * fade * _bump(crease, 0.34)
    light -= 0.16 * depth * fade * _bump(crease - 0.5, 1.1)
    light += 0.07 * fade * _bump(crease + 0.55 * pose.crease_above_mm, 0.5 * pose.crease_above_mm)
    # Socket: the hollow between crease and brow, deepest beside the nose.
    hollow = _bump(crease - 3.0, 3.6) * (0.55 + 0.45 * _ramp(x - cx, -8, 12))
    light -= look.socket * 0.24 * hollow
    # Brow ridge, cheek and the bag under the lower lid.
    light += 0.06 * _bump(y - cy + look.brow_mm - 4.5, 3.0)
    bag = 3.5 + 2.5 * look.age
    light -= (0.05 + 0.13 * look.age) * fade * _bump(below - bag - 0.02 * np.square(x - cx), 0.9)
    light += 0.05 * fade * _bump(below - 0.5 * bag, 1.6)
    lines = np.sin(below * 2.6 + 0.12 * (x - cx) + 0.7 * texture.blotches)
    light += 0.025 * look.age * lines * _bump(below - 4.0, 3.0) * fade
    crow = _ramp(cx - half - x, -1.5, 3)
    light += 0.02 * look.age * crow * np.sin((y - cy) * 1.7 + 0.3 * (x - cx) + texture.blotches)
    # Side of the nose, and the light from one side.
    nose = _ramp(x - cx, half + 1, half + 7)
    light += (0.10 * eye.light[0] - 0.10) * nose
    light += 0.010 * eye.light[0] * (x - cx) + 0.007 * eye.light[1] * (y - cy)
    light += 0.030 * texture.blotches + 0.026 * texture.pores
    # Lashes and lid edge throw a thin shade on the skin beside them.
    light -= 0.16 * inner * _bump(np.maximum(above, 0), 0.5) * (above > 0)
    light -= 0.07 * inner * _bump(np.maximum(below, 0), 0.6) * (below > 0)
    image = np.asarray(look.skin, dtype=np.float32) * light[..., None].astype(np.float32)

    flush = (
        0.30 * inner * (_bump(np.maximum(below, 0), 2.2) + 0.6 * _bump(np.maximum(above, 0), 2.5))
    )
    flush = (flush + 0.05 * texture.blotches) * (0.35 + 0.65 * look.redness)
    image *= 1 + flush[..., None] * np.array([0.02, -0.26, -0.22], dtype=np.float32)
    brown = look.age * 0.5 * fade * _bump(below - 4.5, 4.0)
    image *= 1 - brown[..., None] * np.array([0.16, 0.22, 0.18], dtype=np.float32)
    return image


def _paint_globe(
    grid: Canvas, look: Look, pose: Pose, texture: Texture, upper: Array, lower: Array
) -> tuple[Array, Array, Array]:
    """Return the open eye as if without lids, and coverages of iris and pupil, all (H, W[, 3])."""
    x, y = grid.x, grid.y
    cx, cy = pose.centre_mm
    half = look.width_mm / 2
    radius = np.hypot(x - cx, (y - cy) * 1.15)
    ball = 0.96 - 0.36 * np.square(radius / 15.0)
    globe = np.asarray(look.sclera, dtype=np.float32) * ball[..., None]
    globe += 4.0 * texture.blotches[..., None]
    ends = _ramp(np.abs(x - cx), half * 0.45, half) * (0.35 + 0.65 * look.redness)
    blush = np.clip(0.35 * ends + 0.55 * texture.veins, 0, 1)
    _lay(globe, (206, 96, 84), blush)

    caruncle = _ramp(x - cx + 0.10 * np.abs(y - cy), half - 4.2, half - 2.4)
    pink = (np.asarray(look.skin) * 0.35 + np.array([205, 112, 104]) * 0.65).astype(np.float32)
    _lay(globe, pink * (1 + 0.06 * texture.pores[..., None]), 0.9 * caruncle)

    rim = look.iris_diameter_mm / 2
    dx, dy = x - pose.iris_mm[0], (y - pose.iris_mm[1]) / pose.iris_squash
    r = np.hypot(dx, dy)
    ring = r / rim
    spot = np.asarray(look.iris, dtype=np.float32)
    rows = np.clip(ring * 23, 0, 23)
    turns = (np.arctan2(dy, dx) / (2 * np.pi) + 0.5) * 191
    streak = ndimage.map_coordinates(texture.iris, [rows, turns], order=1, mode="nearest")
    body = 1 + 0.22 * streak + 0.20 * _bump(ring - 0.48, 0.14) - 0.10 * _bump(ring - 0.70, 0.15)
    # The cornea gathers light on the side away from the lamp.
    body = body + 0.16 * (dy / rim)
    body *= 1 - look.iris_ring * _ramp(ring, 0.80, 1.0)
    disc = spot * np.clip(body, 0.2, 1.7)[..., None].astype(np.float32)
    warm = _bump(ring - 0.42, 0.12) * (spot[2] > spot[0])
    disc += warm[..., None] * np.array([34, 14, -18], dtype=np.float32)
    soft = min(grid.px_per_mm, 3.2)
    iris = _step(rim - r, soft)
    pupil = _step(look.pupil_mm / 2 - r, min(grid.px_per_mm, 5.0))
    _lay(globe, disc, iris)
    _lay(globe, (9, 8, 9), pupil)

    # Shade of the lid and its lashes on the globe, and of the lower lid.
    shade = 0.52 * np.exp(-np.maximum(y - upper, 0) / 1.25)
    shade += 0.16 * np.exp(-np.maximum(lower - y, 0) / 0.7)
    globe *= 1 - np.clip(shade, 0, 0.75)[..., None]
    return globe, iris, pupil


def _lashes(
    rng: np.random.Generator, grid: Canvas, look: Look, eye: Anatomy, pose: Pose, gaze_drop: float
) -> Array:
    hairs = _Hairs(grid)
    half = look.width_mm / 2
    cx = pose.centre_mm[0]
    many = int(34 + 66 * look.lash_density)
    at = np.sort(rng.uniform(-0.93, 0.78, many)).astype(np.float32)
    up, _, _ = margins(look, eye, pose, cx + at * half)
    for t, y in zip(at.tolist(), up.tolist(), strict=True):
        size = look.lash_mm * rng.uniform(0.6, 1.1) * (1 - 0.45 * max(t, 0))
        lean = -0.95 * (-t) + 0.25 * t * t + rng.normal(0, 0.13)
        lift = look.lash_curl - 0.9 * gaze_drop + rng.normal(0, 0.08)
        x = cx + t * half
        points = []
        for s in (0.0, 0.35, 0.7, 1.0):
            drop = 0.55 * s - (0.3 + 0.95 * lift) * s * s
            points.append((x + size * 0.75 * lean * s, y + 0.1 + size * 0.62 * drop))
        hairs.stroke(points, 0.24, int(rng.integers(150, 250)))
    few = int(14 + 34 * look.lash_density)
    at = np.sort(rng.uniform(-0.9, 0.62, few)).astype(np.float32)
    _, low, _ = margins(look, eye, pose, cx + at * half)
    for t, y in zip(at.tolist(), low.tolist(), strict=True):
        size = look.lash_mm * rng.uniform(0.22, 0.42)
        lean = 0.7 * t + rng.normal(0, 0.25)
        x, y = cx + t * half, y + 0.55
        points = [(x, y), (x + size * lean * 0.5, y + size * 0.6), (x + size * lean, y + size)]
        hairs.stroke(points, 0.12, int(rng.integers(70, 180)))
    return hairs.cover()


def paint(
    rng: np.random.Generator,
    grid: Canvas,
    look: Look,
    eye: Anatomy,
    pose: Pose,
    texture: Texture,
    *,
    gaze_drop: float,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Paint one picture of a right eye.

    Args:
        rng: the picture's own stream (lashes, sensor noise).
        grid: the pixel grid.
        look: what the subject's eyes share.
        eye: the form of the margins.
        pose: where iris and margins stand in this gaze.
        texture: what the eye's three pictures share.
        gaze_drop: 0 for level or raised lids up to 1 for fully lowered ones; lowers the lashes.

    Returns:
        The picture (H, W, 3) uint8 RGB and its class map (H, W) uint8.
    """
    ppm = grid.px_per_mm
    up, low, t = margins(look, eye, pose, grid.x[0])
    upper = up[None, :].astype(np.float32)
    lower = low[None, :].astype(np.float32)
    # Slopes turn vertical into perpendicular distances, which antialias evenly.
    steep_up = np.sqrt(1 + np.square(np.gradient(up, grid.x[0])))[None, :].astype(np.float32)
    steep_low = np.sqrt(1 + np.square(np.gradient(low, grid.x[0])))[None, :].astype(np.float32)
    within = ((1 - np.abs(t)) * look.width_mm / 2)[None, :].astype(np.float32)
    gap = np.minimum((grid.y - upper) / steep_up, (lower - grid.y) / steep_low)
    cover = _step(gap, ppm) * np.clip(within * ppm, 0, 1) * np.clip((lower - upper) * ppm, 0, 1)

    image = _paint_skin(grid, look, eye, pose, texture, upper, lower)
    # Everything of the open eye lies in one box; painting only there saves half the time.
    box = _box(grid, upper, lower, within)
    spot = Canvas(grid.x[:, box[1]], grid.y[box[0]], ppm)
    up_box, low_box, ends = upper[:, box[1]], lower[:, box[1]], within[:, box[1]]
    view = image[box]
    # The wet rim of the lower lid, and the thinner one of the upper lid, lie outside the opening.
    rim = np.clip(ends / 1.5, 0, 1) * (low_box > up_box)
    below = (spot.y - low_box) / steep_low[:, box[1]]
    wet = (np.asarray(look.skin) * 0.5 + np.array([226, 150, 140]) * 0.5).astype(np.float32)
    strip = _step(below, ppm) * _step(0.75 * rim - below, ppm * 0.6) * np.clip(rim * 2, 0, 1)
    _lay(view, wet, 0.75 * strip)
    above = (up_box - spot.y) / steep_up[:, box[1]]
    edge = _step(above, ppm) * _step(0.42 * rim - above, ppm) * np.clip(rim * 2, 0, 1)
    _lay(view, _darker(look.skin, 0.55), 0.6 * edge)
    # Where the lids touch they leave a dark line.
    shut = _bump(spot.y - up_box, 0.22) * np.clip(ends / 1.5, 0, 1) * (low_box - up_box < 0.3)
    _lay(view, _darker(look.skin, 0.4), 0.8 * shut)

    blotches, pores, veins = (plane[box] for plane in texture[:3])
    small = Texture(blotches, pores, veins, texture.iris, texture.brow)
    globe, iris, pupil = _paint_globe(spot, look, pose, small, up_box, low_box)
    # Tear film: a bright line along the lower margin.
    tear = _bump(low_box - spot.y - 0.18, 0.16) * (0.5 + 0.5 * np.clip(small.blotches, -1, 1))
    globe += 46 * np.maximum(tear, 0)[..., None]
    glint = np.hypot(spot.x - pose.reflex_mm[0], spot.y - pose.reflex_mm[1])
    _lay(globe, (255, 255, 252), _step(look.reflex_mm - glint, min(ppm, 6.0)))
    globe += (42 * _bump(glint, look.reflex_mm * 2.2))[..., None]
    _lay(view, globe, cover[box])

    brow = texture.brow
    soft = (0.5 + 0.4 * look.brow_density) * ndimage.uniform_filter(brow, int(2.2 * ppm) | 1)
    _lay(image, look.hair, np.clip(soft, 0, 0.6))
    _lay(image, look.hair, 0.88 * brow)
    lashes = _lashes(rng, grid, look, eye, pose, gaze_drop)
    _lay(image, _darker(look.hair, 0.7), 0.9 * lashes)

    classes = np.full(image.shape[:2], SKIN, dtype=np.uint8)
    classes[soft > 0.12] = BROW
    inside = (gap > 0) & (within > 0)
    caruncle = grid.x - pose.centre_mm[0] > look.width_mm / 2 - 3.3
    classes[inside] = SCLERA
    classes[inside & caruncle] = CARUNCLE
    classes[box][inside[box] & (iris > 0.5)] = IRIS
    classes[box][inside[box] & (pupil > 0.5)] = PUPIL
    return _expose(rng, grid, look, eye, image), classes


def _expose(
    rng: np.random.Generator, grid: Canvas, look: Look, eye: Anatomy, image: Array
) -> NDArray[np.uint8]:
    """Turn painted colours into what a camera would store: light, lens, sensor, 8 bits."""
    ppm = grid.px_per_mm
    gain = look.exposure * (1 + 0.004 * eye.light[0] * grid.x + 0.004 * eye.light[1] * grid.y)
    gain = gain * (1 - 0.00018 * (grid.x**2 + grid.y**2)) * float(rng.normal(1, 0.03))
    tint = np.array([1 + look.warmth, 1.0, 1 - look.warmth], dtype=np.float32)
    image = (image * gain[..., None] * tint).astype(np.float32)
    # Contrast as a gamma about mid grey, which keeps the hue of dark skin.
    image = 118 * np.power(np.maximum(image, 0) / 118, np.float32(look.contrast))
    # A soft shoulder keeps bright skin from clipping to flat white.
    image = np.where(image > 215, 215 + 40 * np.tanh((image - 215) / 40), image)
    sigma = look.blur_mm * ppm
    image = np.stack([ndimage.gaussian_filter(image[..., c], sigma) for c in range(3)], axis=-1)
    grain = rng.standard_normal(image.shape, dtype=np.float32)
    shared = rng.standard_normal(image.shape[:2], dtype=np.float32)[..., None]
    image += look.noise * (0.55 * grain + 0.75 * shared)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
