"""Defects on a metal surface: they change its maps, and leave masks that are exact.

Every defect is a signed distance in millimetres turned into coverage one pixel wide; its mask is
where the coverage passes one half, so that shape and mask are one thing. Later ones lie on top: a
run of coating, then scratches through it, then dust on everything. Source: METHODS C, Classes.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, spatial

from dinotrain.data.synthetic.metal import Array, Grid, Plate, Surface, slopes

BACKGROUND, DUST, RUNDOWN, SCRATCH = range(4)
CLASSES = ("Background", "Dust", "Rundown", "Scratch")
"""Class names by id."""

# Thinner lines would fall between pixels, and their masks apart.
_MIN_WIDTH_PX = 1.6
_MIN_SPECK_PX = 3.0


class Patch(NamedTuple):
    """What lies on a part of the picture: where, how much of each pixel, and its height in mm."""

    box: tuple[slice, slice]
    cover: Array
    height: Array


def lay_flaws(
    rng: np.random.Generator, grid: Grid, plate: Plate, surface: Surface, shown: frozenset[int]
) -> NDArray[np.uint8]:
    """Put defects of the classes ``shown`` on a surface, in place.

    Args:
        rng: the picture's own stream. Each class, groove and speck draws from a child of its own,
            so that one does not move another, nor the number of pixels any.
        grid: the pixel grid.
        plate: what the surface is made of.
        surface: its maps, changed in place.
        shown: ids of the classes to draw.

    Returns:
        The mask (H, W) uint8: the id of what lies on top.
    """
    mask = np.zeros((grid.size, grid.size), dtype=np.uint8)
    painters = {RUNDOWN: _lay_rundown, SCRATCH: _lay_scratches, DUST: _lay_dust}
    streams = dict(zip(painters, rng.spawn(len(painters)), strict=True))
    for number, paint in painters.items():
        if number in shown:
            mask[paint(streams[number], grid, plate, surface) > 0.5] = number
    return mask


def _step(distance_mm: Array, grid: Grid) -> Array:
    """Return coverage 0..1 of a signed distance, one pixel wide."""
    return np.clip(distance_mm * np.float32(grid.px_per_mm) + 0.5, 0, 1)


def _blend(target: Array, value: Array | float, cover: Array) -> None:
    """Move a map towards a value by the coverage, in place."""
    if target.ndim == 3:
        cover = cover[..., None]
    target += (np.asarray(value, np.float32) - target) * cover


def _box(grid: Grid, low: tuple[float, float], high: tuple[float, float]) -> tuple[slice, slice]:
    """Return rows and columns that hold a box of (x, y) corners in mm; empty outside."""
    spans = []
    for axis in (1, 0):
        ends = np.array([low[axis], high[axis]]) * grid.px_per_mm + grid.size / 2
        first, last = np.clip([np.floor(ends[0]), np.ceil(ends[1])], 0, grid.size).astype(int)
        spans.append(slice(int(first), int(last)))
    return spans[0], spans[1]


# --- runs of coating


def _lay_rundown(rng: np.random.Generator, grid: Grid, plate: Plate, surface: Surface) -> Array:
    """Lay a sag of coating with drips that hang from it; returns its coverage."""
    lean = np.float32(np.tan(np.deg2rad(rng.normal(0, 4))))
    top = float(rng.uniform(-0.46, 0.05) * grid.field_mm)
    centre = float(rng.uniform(-0.3, 0.3) * grid.field_mm)
    drips = int(rng.choice(4, p=(0.45, 0.3, 0.15, 0.1))) + 1
    spread = rng.uniform(5.0, 10.0)
    distance = np.full((grid.size, grid.size), -np.inf, dtype=np.float32)
    # Gravity pulls along the picture's y, give or take the lean of the part.
    down = grid.y - np.float32(top)
    for number in range(drips):
        at = centre + (number - (drips - 1) / 2) * spread + float(rng.normal(0, 0.8))
        side = grid.x - np.float32(at) - lean * down
        distance = np.maximum(distance, _drip(rng, grid, side, down))
    if drips > 1:
        # Between the drips hangs the edge they ran from.
        half = float(drips * spread / 2 + rng.uniform(0, 3))
        wave = 0.7 * np.sin((grid.x - centre) * np.float32(rng.uniform(0.4, 0.8)))
        band = float(rng.uniform(1.2, 2.4))
        across = np.abs(down - wave)
        along = np.maximum(np.abs(grid.x - np.float32(centre)) - half, 0)
        distance = _merge(distance, band - np.hypot(across, along), 1.6)
    return _wet(rng, grid, plate, surface, distance)


def _drip(rng: np.random.Generator, grid: Grid, side: Array, down: Array) -> Array:
    """Return the signed distance of one drip: a wide root, a thin neck, a round bead at its end."""
    length = float(rng.uniform(8, 32))
    root, neck = float(rng.uniform(1.8, 3.6)), float(rng.uniform(0.6, 1.3))
    bead = neck * float(rng.uniform(1.35, 2.1))
    t = down / np.float32(length)
    wobble = 0.35 * np.sin(t * np.float32(rng.uniform(2, 7)) + np.float32(rng.uniform(0, 6.3)))
    side = side - np.float32(neck) * wobble * np.clip(t, 0, 1)
    taper = np.exp(-np.square(np.maximum(t, 0) / np.float32(rng.uniform(0.18, 0.4))))
    width = neck + (root - neck) * taper
    # Ends are round: beyond the root and the bead only a circle is left.
    beyond = np.maximum(-down, np.maximum(down - np.float32(length), 0))
    stem = width - np.hypot(side, np.maximum(beyond, 0))
    drop = bead - np.hypot(side, (down - np.float32(length - 0.2 * bead)) / np.float32(1.25))
    return _merge(stem.astype(np.float32), drop.astype(np.float32), 0.8)


def _merge(a: Array, b: Array, reach_mm: float) -> Array:
    """Return the union of two signed distances, its inner corners filled as a liquid does."""
    near = np.clip(0.5 + 0.5 * (a - b) / reach_mm, 0, 1)
    return (b + (a - b) * near + reach_mm * near * (1 - near) * 0.5).astype(np.float32)


class _Coating(NamedTuple):
    """What runs down: a paint of ``body`` and ``gloss``, or, clear, a ``tint`` over the metal."""

    body: Array
    gloss: Array
    tint: Array | None = None


def _draw_coating(rng: np.random.Generator, plate: Plate) -> _Coating:
    kind = rng.random()
    if plate.finish == "coated":
        # The lacquer of the part itself, a little darker because it is thick.
        lacquer = np.array(plate.lacquer) * rng.uniform(0.75, 0.95)
        return _Coating(0.5 * lacquer, 0.30 + 0.5 * lacquer)
    clear = np.full(3, 0.28)
    if kind < 0.45:
        tint = np.array((0.62, 0.52, 0.36)) ** rng.uniform(0.3, 1.3)
        return _Coating(np.zeros(3), clear, tint.astype(np.float32))
    grey = rng.uniform(0.03, 0.45)
    return _Coating(grey * np.array((1.0, rng.uniform(0.93, 1.0), rng.uniform(0.82, 1.03))), clear)


def _wet(
    rng: np.random.Generator, grid: Grid, plate: Plate, surface: Surface, distance: Array
) -> Array:
    """Turn a shape into a thick, glossy layer of coating; returns its coverage."""
    cover = _step(distance, grid)
    # A liquid's back is round: steep at the rim, flat on top.
    thick = np.float32(0.32) * (1 - np.exp(-np.maximum(distance, 0) / np.float32(0.7)))
    thick = ndimage.gaussian_filter(thick, 0.10 * grid.px_per_mm)
    across, down = slopes(thick * np.float32(rng.uniform(0.7, 1.2)), grid)
    coating = _draw_coating(rng, plate)
    # Below a clear layer the metal's own relief still shows, weaker.
    hidden = cover if coating.tint is None else np.float32(0.7) * cover
    surface.slope_x[:] = surface.slope_x * (1 - hidden) + across
    surface.slope_y[:] = surface.slope_y * (1 - hidden) + down
    _blend(surface.rough_u, 0.06, hidden)
    _blend(surface.rough_v, 0.06, hidden)
    if coating.tint is None:
        _blend(surface.gloss, coating.gloss, cover)
        _blend(surface.body, coating.body, cover)
    else:
        depth = np.clip(thick / np.float32(0.25), 0, 1)[..., None]
        through = surface.gloss * coating.tint**depth * np.float32(0.92)
        _blend(surface.gloss, through + coating.gloss * depth, cover)
    # A thin dark line where the liquid meets the metal, and its shadow just outside.
    rim = np.exp(-np.square((distance - np.float32(0.12)) / np.float32(0.16)))
    outside = np.exp(-np.maximum(-distance, 0) / np.float32(0.22)) * (distance < 0)
    surface.shade[:] *= 1 - 0.30 * rim * cover - 0.18 * outside
    return cover


# --- scratches


def _lay_scratches(rng: np.random.Generator, grid: Grid, plate: Plate, surface: Surface) -> Array:
    """Cut a few scratches; returns their coverage."""
    total = np.zeros((grid.size, grid.size), dtype=np.float32)
    main = _heading(rng, plate)
    for _ in range(int(rng.choice(5, p=(0.35, 0.25, 0.2, 0.12, 0.08))) + 1):
        heading = main + rng.normal(0, 0.1) if rng.random() < 0.6 else _heading(rng, plate)
        path = _path(rng, grid, heading, float(np.exp(rng.uniform(np.log(7), np.log(42)))), 0.02)
        width = float(np.exp(rng.uniform(np.log(0.16), np.log(0.55))))
        depth = float(rng.uniform(0.5, 1.0))
        _cut(rng.spawn(1)[0], grid, plate, surface, total, path, width, depth)
        if rng.random() < 0.25:
            # Two points of the same thing scratch side by side.
            aside = rng.uniform(0.7, 1.6)
            twin = path + aside * np.array([-np.sin(heading), np.cos(heading)])
            part = slice(int(rng.uniform(0, 0.3) * len(twin)), int(rng.uniform(0.7, 1) * len(twin)))
            other = rng.spawn(1)[0]
            _cut(other, grid, plate, surface, total, twin[part], 0.7 * width, 0.8 * depth)
    return total


def _heading(rng: np.random.Generator, plate: Plate) -> float:
    """Return a direction; on brushed metal none along the marks, where nobody could see it."""
    if plate.finish != "brushed":
        return float(rng.uniform(0, np.pi))
    return float(np.deg2rad(plate.angle_deg) + rng.uniform(0.4, np.pi - 0.4))


def _path(
    rng: np.random.Generator, grid: Grid, heading: float, length_mm: float, wander: float
) -> Array:
    """Return points (n, 2) in mm, 0.04 mm apart, around a random place of the picture."""
    count = max(int(length_mm / 0.04), 8)
    bend = rng.normal(0, 0.14) * np.linspace(-1, 1, count)
    drift = ndimage.gaussian_filter1d(rng.standard_normal(count), 30, mode="nearest")
    turn = heading + bend + wander * np.cumsum(drift) * 0.1
    steps = 0.04 * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    points = np.cumsum(steps, axis=0)
    middle = rng.uniform(-0.4, 0.4, 2) * grid.field_mm
    return points - points[count // 2] + middle


def _cut(
    rng: np.random.Generator,
    grid: Grid,
    plate: Plate,
    surface: Surface,
    total: Array,
    path: Array,
    width_mm: float,
    depth: float,
) -> None:
    """Cut one groove along a path; adds its coverage to ``total`` in place."""
    count = len(path)
    along = np.linspace(0, 1, count)
    # It starts and ends shallow, and chatters on the way.
    taper = np.minimum(np.minimum(along / 0.12, (1 - along) / 0.2), 1) ** 0.6
    chatter = ndimage.gaussian_filter1d(rng.standard_normal(count), 8, mode="nearest") * 3.5
    half = width_mm / 2 * taper * np.clip(1 + 0.25 * chatter, 0.6, 1.4)
    half = np.maximum(half, _MIN_WIDTH_PX / 2 / grid.px_per_mm)
    found = _nearest(grid, path, float(half.max()) + 0.5)
    if found is None:
        return
    box, off, side, index = found
    reach = half.astype(np.float32)[index]
    cover = _step(reach - off, grid)
    view = Surface(*(plane[box] for plane in surface))
    across = side / reach
    # A groove's walls lean inwards, the burr beside it outwards.
    lean = np.float32(0.8 * depth) * np.clip(across, -1, 1)
    burr = -0.25 * depth * np.sign(across) * np.exp(-np.square((np.abs(across) - 1.25) / 0.3))
    tangent = np.gradient(path, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    normal = np.stack([-tangent[:, 1], tangent[:, 0]], axis=1).astype(np.float32)[index]
    outside = (1 - cover) * burr
    view.slope_x[:] = view.slope_x * (1 - cover) + (cover * lean + outside) * normal[..., 0]
    view.slope_y[:] = view.slope_y * (1 - cover) + (cover * lean + outside) * normal[..., 1]
    # Torn metal is bright and scatters more than what is around it; a deep groove lies in shadow.
    dark = rng.random() < 0.35
    fresh = np.array(plate.metal, np.float32) * np.float32(0.7 if dark else rng.uniform(1.2, 1.7))
    _blend(view.gloss, np.minimum(fresh, 0.95), cover * np.float32(0.9))
    _blend(view.body, (0.1 if dark else 0.45) * fresh, cover * np.float32(0.9))
    _blend(view.rough_u, 0.24, cover)
    _blend(view.rough_v, 0.24, cover)
    bottom = np.exp(-np.square(across / (0.9 if dark else 0.4)))
    hidden = rng.uniform(0.55, 0.8) if dark else rng.uniform(0.1, 0.4)
    view.shade[:] *= 1 - np.float32(hidden * depth) * bottom * cover
    np.maximum(total[box], cover, out=total[box])


def _nearest(
    grid: Grid, path: Array, reach_mm: float
) -> tuple[tuple[slice, slice], Array, Array, NDArray[np.int64]] | None:
    """Find the nearest point of a path for every pixel of the box around it.

    Returns:
        The box, and over it: the distance in mm, the same with a sign for the side, and the number
        of the nearest point. None where the path misses the picture.
    """
    low, high = path.min(axis=0) - reach_mm, path.max(axis=0) + reach_mm
    box = _box(grid, (low[0], low[1]), (high[0], high[1]))
    xs, ys = grid.x[0, box[1]], grid.y[box[0], 0]
    if not len(xs) or not len(ys):
        return None
    places = np.stack(np.meshgrid(xs, ys), axis=-1).astype(np.float64)
    off, index = spatial.KDTree(path).query(places, distance_upper_bound=reach_mm)
    missing = ~np.isfinite(off)
    index = np.where(missing, 0, index)
    tangent = np.gradient(path, axis=0)[index]
    away = places - path[index]
    left = np.sign(tangent[..., 0] * away[..., 1] - tangent[..., 1] * away[..., 0])
    off = np.where(missing, 1e3, off).astype(np.float32)
    return box, off, (left * off).astype(np.float32), index


# --- dust


def _lay_dust(rng: np.random.Generator, grid: Grid, plate: Plate, surface: Surface) -> Array:
    """Scatter specks and fibres; returns their coverage."""
    total = np.zeros((grid.size, grid.size), dtype=np.float32)
    bearing = rng.uniform(0, 2 * np.pi)
    toward = np.array([np.cos(bearing), np.sin(bearing)])
    # Lighter or darker than what it lies on: dust of the same grey could not be labelled.
    ground = float(surface.gloss.mean() + surface.body.mean())
    grey = ground * (rng.uniform(1.3, 2.0) if rng.random() < 0.65 else rng.uniform(0.05, 0.16))
    colour = min(grey, 0.95) * np.array((1.0, rng.uniform(0.92, 1.0), rng.uniform(0.78, 0.98)))
    many = int(np.exp(rng.uniform(np.log(6), np.log(60))))
    middles = rng.uniform(-0.42, 0.42, (int(rng.integers(1, 4)), 2)) * grid.field_mm
    for _ in range(many):
        if rng.random() < 0.65:
            place = middles[int(rng.integers(len(middles)))] + rng.normal(0, 4.0, 2)
        else:
            place = rng.uniform(-0.48, 0.48, 2) * grid.field_mm
        radius = float(np.clip(np.exp(rng.normal(np.log(0.28), 0.5)), 0.1, 0.9))
        shade = colour * rng.uniform(0.8, 1.2)
        _speck(rng.spawn(1)[0], grid, surface, total, place, radius, toward, shade)
    for _ in range(int(rng.choice(4, p=(0.4, 0.3, 0.2, 0.1)))):
        path = _path(rng, grid, rng.uniform(0, np.pi), float(rng.uniform(2, 9)), 0.55)
        _fibre(grid, surface, total, path, float(rng.uniform(0.06, 0.12)), colour)
    return total


def _speck(
    rng: np.random.Generator,
    grid: Grid,
    surface: Surface,
    total: Array,
    place: Array,
    radius_mm: float,
    toward: Array,
    colour: Array,
) -> None:
    """Lay one grain of dust with an uneven outline."""
    radius = max(radius_mm, _MIN_SPECK_PX / 2 / grid.px_per_mm)
    reach = 2.2 * radius + 0.3
    box = _box(grid, (place[0] - reach, place[1] - reach), (place[0] + reach, place[1] + reach))
    dx, dy = grid.x[:, box[1]] - place[0], grid.y[box[0]] - place[1]
    if not dx.size or not dy.size:
        return
    squash, turn = rng.uniform(0.55, 1.0), rng.uniform(0, np.pi)
    u = (dx * np.cos(turn) + dy * np.sin(turn)) * squash**0.5
    v = (dy * np.cos(turn) - dx * np.sin(turn)) / squash**0.5
    bearing = np.arctan2(v, u)
    edge = sum(
        rng.normal(0, 0.16 / k**0.5) * np.cos(k * bearing + rng.uniform(0, 6.3))
        for k in range(2, 6)
    )
    distance = (radius * (1 + np.clip(edge, -0.45, 0.6)) - np.hypot(u, v)).astype(np.float32)
    cover = _step(distance, grid)
    view = Surface(*(plane[box] for plane in surface))
    # It throws a short shadow away from the light and is brighter on the side towards it.
    behind = np.hypot(dx + 0.35 * radius * toward[0], dy + 0.35 * radius * toward[1])
    view.shade[:] *= 1 - 0.30 * np.exp(-np.square(behind / (1.1 * radius))) * (1 - cover)
    lit = 1 + 0.35 * (dx * toward[0] + dy * toward[1]) / radius
    crumb = 1 + 0.12 * rng.standard_normal(cover.shape)
    _chalk(view, (colour * (lit * crumb)[..., None]).astype(np.float32), cover)
    np.maximum(total[box], cover, out=total[box])


def _fibre(
    grid: Grid, surface: Surface, total: Array, path: Array, width_mm: float, colour: Array
) -> None:
    """Lay one hair of lint."""
    half = max(width_mm / 2, _MIN_WIDTH_PX / 2 / grid.px_per_mm)
    found = _nearest(grid, path, half + 0.5)
    if found is None:
        return
    box, off, side, _ = found
    cover = _step(half - off, grid)
    view = Surface(*(plane[box] for plane in surface))
    view.shade[:] *= 1 - 0.22 * np.exp(-np.square((side - 1.6 * half) / half)) * (1 - cover)
    _chalk(view, (colour * np.ones((*cover.shape, 1))).astype(np.float32), cover)
    np.maximum(total[box], cover, out=total[box])


def _chalk(view: Surface, colour: Array, cover: Array) -> None:
    """Make a place matte and of a colour."""
    _blend(view.slope_x, 0.0, cover)
    _blend(view.slope_y, 0.0, cover)
    _blend(view.gloss, 0.0, cover)
    _blend(view.body, colour, cover)
    _blend(view.shade, 1.0, cover)
