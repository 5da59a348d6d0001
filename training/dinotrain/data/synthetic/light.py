"""Maps of a metal surface under lamps, seen by a camera: linear light, then 8-bit pixels."""

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dinotrain.data.synthetic.metal import FIELD_MM, Array, Grid, Surface

# Camera and lamps hang at about this height over a field of ``FIELD_MM``; it turns places into the
# slopes that mirror a lamp. A smaller field is seen from as much nearer, with lamps as much nearer.
_HEIGHT_MM = 130.0


class Lamp(msgspec.Struct, frozen=True, kw_only=True):
    """One lamp: where a flat surface would mirror it (for ``FIELD_MM``), how wide, how bright."""

    at_mm: tuple[float, float]
    width: float
    power: float


class Shot(msgspec.Struct, frozen=True, kw_only=True):
    """One exposure: lamps, the gradient of the surrounding light, and the camera."""

    lamps: tuple[Lamp, ...]
    toward: tuple[float, float]
    """Unit vector in the picture towards the main lamp."""
    gradient: tuple[float, float]
    ambient: float
    level: float
    warmth: float
    vignette: float
    blur_px: float
    noise: float


def draw_shot(rng: np.random.Generator) -> Shot:
    """Draw lamps and camera of one picture."""
    bearing = rng.uniform(0, 2 * np.pi)
    toward = float(np.cos(bearing)), float(np.sin(bearing))
    far = rng.uniform(5, 38)
    main = Lamp(
        at_mm=(far * toward[0], far * toward[1]),
        width=float(rng.uniform(0.03, 0.14)),
        power=1.0,
    )
    other = rng.uniform(0, 2 * np.pi)
    away = rng.uniform(30, 75)
    fill = Lamp(
        at_mm=(float(away * np.cos(other)), float(away * np.sin(other))),
        width=float(rng.uniform(0.1, 0.25)),
        power=float(rng.uniform(0.15, 0.6)),
    )
    slope = rng.normal(0, 0.006, 2)
    return Shot(
        lamps=(main, fill),
        toward=toward,
        gradient=(float(slope[0]), float(slope[1])),
        ambient=float(rng.uniform(0.25, 0.5)),
        level=float(rng.uniform(0.16, 0.34)),
        warmth=float(np.clip(rng.normal(0, 0.03), -0.08, 0.08)),
        vignette=float(rng.uniform(0.02, 0.22)),
        blur_px=float(rng.uniform(0.35, 0.75)),
        noise=float(rng.uniform(0.6, 3.0)),
    )


def shine(surface: Surface, grid: Grid, shot: Shot) -> Array:
    """Return the light that leaves each place towards the camera, (H, W, 3) linear.

    A place mirrors a lamp where its slope is the one between lamp and camera; slopes below a pixel
    spread that, unevenly along and across brush marks (Ward's anisotropic highlight).
    """
    scale = np.float32(FIELD_MM / grid.field_mm)
    x, y = grid.x * scale, grid.y * scale
    spread = np.float32(shot.ambient) + np.float32(shot.gradient[0]) * x
    spread = spread + np.float32(shot.gradient[1]) * y
    mirrored = np.maximum(spread, 0.05)
    diffuse = np.maximum(spread, 0.05)
    for lamp in shot.lamps:
        need_x = (lamp.at_mm[0] - x) / _HEIGHT_MM + surface.slope_x
        need_y = (lamp.at_mm[1] - y) / _HEIGHT_MM + surface.slope_y
        along = need_x * surface.cos + need_y * surface.sin
        across = need_y * surface.cos - need_x * surface.sin
        wide_u = np.square(surface.rough_u) + lamp.width**2
        wide_v = np.square(surface.rough_v) + lamp.width**2
        lobe = np.exp(-np.square(along) / wide_u - np.square(across) / wide_v)
        # The same light spread wider is dimmer, though a camera's exposure follows in part.
        mirrored = mirrored + lamp.power * lobe * (0.05 / np.sqrt(wide_u * wide_v)) ** 0.5
        # Chalk-like: brighter where the surface leans towards the lamp.
        lean = 1 - 1.4 * (surface.slope_x * shot.toward[0] + surface.slope_y * shot.toward[1])
        diffuse = diffuse + 0.55 * lamp.power * np.clip(lean, 0, 2.2)
    light = surface.gloss * mirrored[..., None] + surface.body * diffuse[..., None]
    return light * surface.shade[..., None]


def expose(
    rng: np.random.Generator, light: Array, grid: Grid, shot: Shot, gain: float
) -> NDArray[np.uint8]:
    """Turn light into what a camera would store: lens, exposure, sensor noise, sRGB, 8 bits."""
    half = grid.field_mm / 2
    corner = np.square(grid.x / half) + np.square(grid.y / half)
    tint = np.array([1 + shot.warmth, 1, 1 - shot.warmth], np.float32)
    image = light * (gain * (1 - shot.vignette * corner / 2))[..., None] * tint
    image = np.stack(
        [ndimage.gaussian_filter(image[..., c], shot.blur_px) for c in range(3)], axis=-1
    )
    # A soft shoulder instead of flat white.
    image = np.where(image > 0.7, 0.7 + 0.3 * np.tanh((image - 0.7) / 0.3), image)
    levels = 255 * np.power(np.clip(image, 0, 1), np.float32(1 / 2.2))
    grain = rng.standard_normal(image.shape, dtype=np.float32)
    shared = rng.standard_normal(image.shape[:2], dtype=np.float32)[..., None]
    levels = levels + shot.noise * (0.5 * grain + 0.8 * shared)
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def exposure(light: Array, shot: Shot) -> float:
    """Return the gain that brings the mean of the light to the shot's level."""
    return shot.level / max(float(light.mean()), 1e-3)
