"""What a synthetic metal surface is before it has defects: its relief, its gloss, its colour.

A surface is a set of maps over the picture (``Surface``): slopes, roughness along and across the
brush marks, reflectance and body colour. Defects change the maps; ``light`` turns them into pixels.
Image frame: millimetres from the image centre, x to the right, y downwards.
"""

from typing import Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[np.floating]
Finish = Literal["brushed", "cast", "coated"]
FINISHES: tuple[Finish, ...] = ("brushed", "cast", "coated")
Rgb = tuple[float, float, float]

FIELD_MM = 50.0
"""Width of what a picture shows, unless another is asked for."""

# Linear reflectance at normal incidence: steel, aluminium, zinc, titanium, brass, copper, iron.
_BRUSHED = ((0.53, 0.54, 0.55), (0.78, 0.79, 0.80), (0.63, 0.65, 0.67), (0.50, 0.47, 0.44))
_WARM = ((0.80, 0.66, 0.36), (0.82, 0.52, 0.42))
_CAST = ((0.34, 0.335, 0.33), (0.55, 0.56, 0.57), (0.42, 0.41, 0.40), (0.29, 0.27, 0.26))
# Metallic lacquers, linear: silver, graphite, champagne, steel blue, white aluminium.
_LACQUER = (
    (0.44, 0.45, 0.46),
    (0.12, 0.125, 0.13),
    (0.44, 0.40, 0.34),
    (0.17, 0.22, 0.28),
    (0.52, 0.53, 0.53),
)


class Plate(msgspec.Struct, frozen=True, kw_only=True):
    """What all pictures of one part share; colours are linear RGB in 0..1."""

    finish: Finish
    metal: Rgb
    lacquer: Rgb
    flakes: float
    """How coarse the flakes of a lacquer are, 0 to 1."""
    angle_deg: float
    """Direction of the brush marks against x."""
    bow_mm: float
    """Distance of the centre around which the marks are bent; large is straight."""
    rough_along: float
    rough_across: float
    grain: float
    bump: float
    pits: float


class Grid(NamedTuple):
    """The pixel grid in mm of the image frame: x (1, W), y (H, 1)."""

    x: Array
    y: Array
    px_per_mm: float

    @property
    def size(self) -> int:
        """Side of the square image in pixels."""
        return self.x.shape[1]

    @property
    def field_mm(self) -> float:
        """Side of the square image in mm."""
        return self.size / self.px_per_mm


class Surface(NamedTuple):
    """Maps that ``light`` reads; all float32, changed in place by defects.

    ``slope_x`` and ``slope_y`` are dz/dx and dz/dy; ``rough_u`` and ``rough_v`` the spread of the
    slopes below a pixel along and across the marks, whose direction is (``cos``, ``sin``);
    ``gloss`` (H, W, 3) reflects like a mirror with that spread, ``body`` (H, W, 3) like chalk;
    ``shade`` dims what falls on a place.
    """

    slope_x: Array
    slope_y: Array
    rough_u: Array
    rough_v: Array
    cos: Array
    sin: Array
    gloss: Array
    body: Array
    shade: Array


def grid_of(size: int, field_mm: float = FIELD_MM) -> Grid:
    """Return the pixel centres of a square picture."""
    px_per_mm = size / field_mm
    line = ((np.arange(size) + 0.5 - size / 2) / px_per_mm).astype(np.float32)
    return Grid(line[None, :], line[:, None], px_per_mm)


def _pick(rng: np.random.Generator, table: tuple[Rgb, ...], sd: float) -> Rgb:
    chosen = np.array(table[int(rng.integers(len(table)))])
    tinted = np.clip(chosen * rng.normal(1, sd) * rng.normal(1, sd / 8, 3), 0.02, 0.95)
    return float(tinted[0]), float(tinted[1]), float(tinted[2])


def draw_plate(rng: np.random.Generator) -> Plate:
    """Draw what the pictures of one part share."""
    finish = FINISHES[int(rng.choice(3, p=(0.5, 0.25, 0.25)))]
    warm = rng.random() < 0.15
    table = _CAST if finish == "cast" else _WARM if warm else _BRUSHED
    upright = rng.random() < 0.4
    rough = {
        "brushed": (rng.uniform(0.07, 0.13), rng.uniform(0.26, 0.42)),
        "cast": (rng.uniform(0.17, 0.26),) * 2,
        "coated": (rng.uniform(0.13, 0.22),) * 2,
    }[finish]
    return Plate(
        finish=finish,
        metal=_pick(rng, table, 0.06),
        lacquer=_pick(rng, _LACQUER, 0.12),
        flakes=float(rng.uniform(0, 1)),
        angle_deg=float(rng.normal(90 if upright else 0, 5)),
        bow_mm=float(np.exp(rng.uniform(np.log(70), np.log(4000)))),
        rough_along=float(rough[0]),
        rough_across=float(rough[1]),
        # Coarse marks on a warm metal read as wood.
        grain=float(rng.uniform(0.6, 1.2) * (0.6 if warm else 1.0)),
        bump=float(rng.uniform(0.4, 1.2)),
        pits=float(np.clip(rng.uniform(-0.3, 1.0), 0, 1)),
    )


def noise(rng: np.random.Generator, grid: Grid, scale_mm: float) -> Array:
    """Return smooth noise (H, W) of unit spread, whose bumps are about ``scale_mm`` wide.

    Drawn on a grid of its own, so that a picture of another size shows the same bumps as far as
    its pixels can.
    """
    cells = int(np.ceil(grid.field_mm / scale_mm)) + 4
    table = rng.standard_normal((cells, cells), dtype=np.float32)
    rows = (grid.y[:, 0] + grid.field_mm / 2) / scale_mm + 1.5
    cols = (grid.x[0] + grid.field_mm / 2) / scale_mm + 1.5
    # Cubic B-splines, one axis after the other: the smoothest bumps for their cost.
    across = _spline(table, cols)
    field = _spline(np.ascontiguousarray(across.T), rows).T
    # The spread of such a sum of B-splines over their random weights.
    return field / np.float32(0.479)


def _spline(table: Array, places: Array) -> Array:
    """Evaluate the cubic B-spline of each row at ``places``."""
    whole = np.floor(places).astype(np.int64)
    t = (places - whole).astype(np.float32)
    weights = (
        (1 - t) ** 3 / 6,
        (3 * t**3 - 6 * t**2 + 4) / 6,
        (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6,
        t**3 / 6,
    )
    result = np.zeros((table.shape[0], len(places)), dtype=np.float32)
    for offset, weight in enumerate(weights):
        result += table[:, whole + offset - 1] * weight
    return result


def slopes(height_mm: Array, grid: Grid) -> tuple[Array, Array]:
    """Return dz/dx and dz/dy of a height map in mm."""
    down, across = np.gradient(height_mm, np.float32(1 / grid.px_per_mm))
    return across.astype(np.float32), down.astype(np.float32)


def draw_surface(rng: np.random.Generator, grid: Grid, plate: Plate) -> Surface:
    """Draw the maps of a flawless surface."""
    if plate.finish == "brushed":
        return _brushed(rng, grid, plate)
    return _cast(rng, grid, plate) if plate.finish == "cast" else _coated(rng, grid, plate)


def _plain(grid: Grid, plate: Plate) -> Surface:
    shape = (grid.size, grid.size)

    def full(value: float) -> Array:
        return np.full(shape, value, dtype=np.float32)

    def colour(rgb: Rgb) -> Array:
        return np.broadcast_to(np.array(rgb, np.float32), (*shape, 3)).copy()

    return Surface(
        slope_x=full(0),
        slope_y=full(0),
        rough_u=full(plate.rough_along),
        rough_v=full(plate.rough_across),
        cos=full(1),
        sin=full(0),
        gloss=colour(plate.metal),
        body=colour((0.0, 0.0, 0.0)),
        shade=full(1),
    )


def _streaks(rng: np.random.Generator, along: Array, across: Array, grid: Grid) -> Array:
    """Return brush marks (H, W), about zero with unit spread: long, thin, of many lengths."""
    pitch = 1 / grid.px_per_mm
    rows = int(1.5 * grid.size) + 8
    v = across / pitch + rows / 2
    total = np.zeros(across.shape, dtype=np.float32)
    for length, width, weight in ((3.0, 0.0, 0.7), (9.0, 0.4, 0.9), (28.0, 0.7, 0.7), (60, 8, 0.5)):
        cells = int(np.ceil(1.5 * grid.field_mm / length)) + 6
        table = rng.standard_normal((rows, cells), dtype=np.float32)
        # A few deep marks among many faint ones.
        table = np.sign(table) * np.abs(table) ** 1.3
        if width:
            table = ndimage.gaussian_filter1d(table, width, axis=0, mode="wrap")
        # Rows start at places of their own, so that marks do not end side by side.
        start = rng.uniform(0, 1, rows).astype(np.float32)
        u = along / length + cells / 2
        u = u + start[np.clip(v.astype(np.int64), 0, rows - 1)] - 0.5
        sampled = ndimage.map_coordinates(table, [v, u], order=1, mode="wrap")
        total += weight * sampled / max(float(sampled.std()), 1e-6)
    return total / np.float32(1.5)


def _brushed(rng: np.random.Generator, grid: Grid, plate: Plate) -> Surface:
    surface = _plain(grid, plate)
    angle = np.deg2rad(plate.angle_deg)
    side = 1.0 if rng.random() < 0.5 else -1.0
    # Marks run around a far centre, at right angles to the line from it.
    cx, cy = -side * plate.bow_mm * np.sin(angle), side * plate.bow_mm * np.cos(angle)
    dx, dy = grid.x - cx, grid.y - cy
    radius = np.hypot(dx, dy)
    across = (radius - plate.bow_mm).astype(np.float32)
    turn = np.arctan2(dy, dx) - np.arctan2(-cy, -cx)
    along = (((turn + np.pi) % (2 * np.pi) - np.pi) * plate.bow_mm).astype(np.float32)
    surface.cos[:] = -dy / radius
    surface.sin[:] = dx / radius
    marks = _streaks(rng, along, across, grid)
    fine = rng.standard_normal(marks.shape, dtype=np.float32)
    # What lies across the marks tilts; along them a mark is flat.
    tilt = 0.10 * plate.grain * marks + 0.015 * fine
    surface.slope_x[:] = -tilt * surface.sin
    surface.slope_y[:] = tilt * surface.cos
    waves = noise(rng, grid, 14.0)
    surface.gloss[:] *= (1 + 0.075 * plate.grain * marks + 0.03 * waves + 0.02 * fine)[..., None]
    surface.rough_u[:] *= 1 + 0.12 * waves
    return surface


def _cast(rng: np.random.Generator, grid: Grid, plate: Plate) -> Surface:
    surface = _plain(grid, plate)
    height = np.zeros((grid.size, grid.size), dtype=np.float32)
    for scale, amount in ((0.22, 0.009), (0.45, 0.015), (1.0, 0.018), (2.6, 0.03), (9.0, 0.15)):
        height += np.float32(amount * plate.bump) * noise(rng, grid, scale)
    # Sand and gas leave shallow pits: where a field dips low enough the skin is missing.
    pits = np.clip(noise(rng, grid, 0.55) - (3.2 - 0.9 * plate.pits), 0, 0.8)
    height -= 0.10 * pits
    across, down = slopes(height, grid)
    speckle = rng.standard_normal((2, *height.shape), dtype=np.float32)
    surface.slope_x[:] = across + 0.02 * speckle[0]
    surface.slope_y[:] = down + 0.02 * speckle[1]
    # Hollows see less of the sky; the mean of a neighbourhood tells what is a hollow.
    hollow = ndimage.gaussian_filter(height, 0.6 * grid.px_per_mm) - height
    surface.shade[:] *= np.clip(1 - 4.0 * np.maximum(hollow, 0), 0.45, 1.0)
    stains = noise(rng, grid, 4.0) + noise(rng, grid, 16.0)
    surface.gloss[:] *= (1 + 0.06 * stains)[..., None]
    surface.body[:] = 0.06 * surface.gloss
    return surface


def _coated(rng: np.random.Generator, grid: Grid, plate: Plate) -> Surface:
    surface = _plain(grid, plate)
    # Orange peel: shallow waves of about a millimetre that wobble every reflection.
    peel = 0.006 * noise(rng, grid, 0.8) + 0.018 * noise(rng, grid, 1.8)
    peel += 0.08 * noise(rng, grid, 9.0)
    across, down = slopes((plate.bump * peel).astype(np.float32), grid)
    # Every flake leans its own way: a fine sparkle, strongest beside a highlight.
    flakes = rng.standard_normal((2, *peel.shape), dtype=np.float32)
    flakes = ndimage.gaussian_filter(flakes, (0, 0.5, 0.5)) * np.float32(
        0.015 + 0.05 * plate.flakes
    )
    surface.slope_x[:] = across + flakes[0]
    surface.slope_y[:] = down + flakes[1]
    lacquer = np.array(plate.lacquer, np.float32)
    surface.gloss[:] = 0.06 + lacquer
    surface.body[:] = 0.22 * lacquer
    return surface
