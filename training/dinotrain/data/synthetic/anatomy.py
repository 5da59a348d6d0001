"""What a synthetic eye is before it is painted: its measures in millimetres and its looks.

Image frame: millimetres from the image centre, x to the right, y downwards. All eyes are drawn as
right eyes (nasal side at +x); left eyes are mirrored as finished pictures. A head that is tilted in
the image plane tilts the line between the canthi, while distances stay vertical in the image, so
that every label is exact whatever the tilt.
Source: METHODS B2, B3 (targets, normals, alignment on the canthi).
"""

from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

Gaze = Literal["primary", "up", "down"]
GAZES: tuple[Gaze, ...] = ("primary", "up", "down")

Array = NDArray[np.floating]
Rgb = tuple[float, float, float]

# Highest place of an upper margin, so that the open lid stays clear of the brow.
_TOP_MM = -13.0
# Least opening left in down-gaze: a shut eye shows no margin.
_LEAST_GAP_MM = 0.6

_SKIN = np.array(
    [
        (246, 218, 200),
        (234, 196, 170),
        (212, 166, 134),
        (176, 126, 94),
        (130, 88, 62),
        (86, 58, 44),
        (62, 42, 34),
    ],
    dtype=np.float64,
)
_HAIR = np.array([(18, 14, 13), (34, 24, 19), (62, 42, 29), (112, 82, 54)], dtype=np.float64)
_IRIS = np.array(
    [
        (44, 28, 20),
        (78, 48, 29),
        (116, 78, 42),
        (122, 112, 66),
        (98, 124, 124),
        (102, 136, 166),
        (132, 144, 152),
    ],
    dtype=np.float64,
)


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """What both eyes of a subject share; colours are RGB in 0..255."""

    skin: Rgb
    hair: Rgb
    iris: Rgb
    iris_ring: float
    sclera: Rgb
    iris_diameter_mm: float
    width_mm: float
    tilt_deg: float
    crease_mm: float
    crease_depth: float
    socket: float
    age: float
    lash_mm: float
    lash_curl: float
    lash_density: float
    brow_mm: float
    brow_thickness_mm: float
    brow_density: float
    redness: float
    pupil_mm: float
    warmth: float
    exposure: float
    contrast: float
    blur_mm: float
    noise: float
    reflex_mm: float


class Pose(msgspec.Struct, frozen=True, kw_only=True):
    """One gaze: where iris and margins stand, in mm of the image frame.

    ``upper_mm`` and ``lower_mm`` are the margins' y at the x of the primary light reflex.
    """

    centre_mm: tuple[float, float]
    iris_mm: tuple[float, float]
    iris_squash: float
    reflex_mm: tuple[float, float]
    upper_mm: float
    lower_mm: float
    crease_above_mm: float


class Anatomy(msgspec.Struct, frozen=True, kw_only=True):
    """One eye: its labels, the form of its margins and its three poses."""

    mrd1_mm: float
    mrd2_mm: float
    lf_mm: float
    tilt_deg: float
    anchor_x_mm: float
    upper_peak: float
    lower_peak: float
    upper_power: tuple[float, float]
    lower_power: tuple[float, float]
    light: tuple[float, float]
    poses: dict[Gaze, Pose]


def _colour(table: NDArray[np.float64], place: float, rng: np.random.Generator, sd: float) -> Rgb:
    steps = np.arange(len(table))
    mixed = [float(np.interp(place * (len(table) - 1), steps, table[:, c])) for c in range(3)]
    shift = rng.normal(0, sd, 3)
    r, g, b = (float(np.clip(v + s, 4, 252)) for v, s in zip(mixed, shift, strict=True))
    return r, g, b


def _normal(rng: np.random.Generator, mean: float, sd: float, low: float, high: float) -> float:
    return float(np.clip(rng.normal(mean, sd), low, high))


def draw_look(rng: np.random.Generator) -> Look:
    """Draw what both eyes of one subject share."""
    tone = float(rng.uniform(0, 1))
    # Dark skin rarely goes with light eyes or light hair.
    light_limit = float(np.clip(1.15 - 1.3 * tone, 0.15, 1.0))
    white = 232 + float(rng.normal(0, 7))
    yellow = abs(float(rng.normal(0, 6))) + 6 * tone
    return Look(
        skin=_colour(_SKIN, tone, rng, 5),
        hair=_colour(_HAIR, float(rng.uniform(0, 1) ** 1.5 * light_limit), rng, 4),
        iris=_colour(_IRIS, float(rng.uniform(0, light_limit)), rng, 6),
        iris_ring=float(rng.uniform(0.25, 0.85)),
        sclera=(white, white - 3 - 0.3 * yellow, white - 4 - yellow),
        iris_diameter_mm=_normal(rng, 11.7, 0.4, 10.6, 12.8),
        width_mm=float(rng.uniform(26, 32)),
        tilt_deg=_normal(rng, 2.5, 2.2, -3, 8),
        crease_mm=float(rng.uniform(3.0, 8.5)),
        crease_depth=float(np.clip(rng.uniform(-0.15, 1.0), 0, 1)),
        socket=float(rng.uniform(0, 1)),
        age=float(rng.uniform(0, 1)),
        lash_mm=float(rng.uniform(3.0, 7.5)),
        lash_curl=float(rng.uniform(0.1, 1.0)),
        lash_density=float(rng.uniform(0.3, 1.0)),
        brow_mm=float(rng.uniform(15.0, 20.5)),
        brow_thickness_mm=float(rng.uniform(3.0, 7.5)),
        brow_density=float(rng.uniform(0.25, 1.0)),
        redness=float(rng.uniform(0, 1)),
        pupil_mm=float(rng.uniform(2.2, 5.8)),
        warmth=_normal(rng, 0.02, 0.06, -0.14, 0.18),
        exposure=_normal(rng, 1.0, 0.16, 0.6, 1.35),
        contrast=_normal(rng, 1.0, 0.12, 0.7, 1.3),
        blur_mm=float(rng.uniform(0.03, 0.16)),
        noise=float(rng.uniform(0.6, 5.0)),
        reflex_mm=float(rng.uniform(0.28, 0.6)),
    )


def draw_anatomy(rng: np.random.Generator, look: Look) -> Anatomy:
    """Draw one eye's labels, and the poses from which those labels follow exactly.

    The spread is wider than any clinic's, so that a model trained on it learns to measure instead
    of guessing the mean.
    """
    mrd1 = float(rng.uniform(-1.5, 6.0)) if rng.random() < 0.6 else _normal(rng, 3.2, 1.2, -1.5, 6)
    mrd2 = float(rng.uniform(3.0, 8.0)) if rng.random() < 0.5 else _normal(rng, 5.3, 0.9, 3, 8)
    # The lower lid hangs 2 to 5 mm under the line of the canthi; the eyeball sits where MRD2 asks.
    depth = _normal(rng, 3.2 + 0.35 * (mrd2 - 5.3), 0.6, 1.8, 5.5)
    reflex_y = depth - mrd2
    upper = reflex_y - mrd1
    lower = {"primary": depth, "up": depth - _normal(rng, 1.0, 0.5, 0, 2.2)}
    lower["down"] = depth + _normal(rng, 2.4, 0.7, 0.6, 4.0)
    lowest = lower["down"] - _LEAST_GAP_MM
    most = min(lowest - _TOP_MM, 18.0)
    if rng.random() < 0.5:
        lf = float(rng.uniform(2.0, most))
    else:
        lf = float(np.clip(rng.normal(12.5 + 1.0 * (mrd1 - 3.0), 2.2), 2.0, most))
    rise = float(np.clip(rng.normal(0.36, 0.08), 0.12, 0.6))
    # The part below primary ends above the lower lid, the rest under the brow.
    rise = min(max(rise, 1 - (lowest - upper) / lf), (upper - _TOP_MM) / lf)
    uppers = {"primary": upper, "up": upper - rise * lf, "down": upper + (1 - rise) * lf}

    tilt = look.tilt_deg + _normal(rng, 0, 1.6, -4, 4)
    # Angle kappa: the reflex stands a little nasal of the pupil's centre.
    off_x, off_y = _normal(rng, 0.3, 0.2, -0.3, 0.9), _normal(rng, 0, 0.12, -0.3, 0.3)
    iris_x = _normal(rng, -0.3, 0.8, -2.2, 2.2)
    anchor = iris_x + off_x
    turn = {
        "primary": 0.0,
        "up": -_normal(rng, 5.6, 0.9, 3, 8),
        "down": _normal(rng, 6.2, 1.0, 3, 9),
    }
    shared = rng.uniform(-0.7, 0.7, 2)
    poses: dict[Gaze, Pose] = {}
    for gaze in GAZES:
        centre = shared + rng.uniform(-0.25, 0.25, 2)
        cx, cy = float(centre[0]), float(centre[1])
        shift = turn[gaze]
        follow = uppers[gaze] - upper
        poses[gaze] = Pose(
            centre_mm=(cx, cy),
            iris_mm=(cx + iris_x, cy + reflex_y - off_y + shift),
            # A sphere of 13 mm turns the iris away from the camera as it shifts it.
            iris_squash=float(np.sqrt(1 - (shift / 13.0) ** 2)),
            reflex_mm=(cx + anchor, cy + reflex_y + 0.62 * shift),
            upper_mm=cy + uppers[gaze],
            lower_mm=cy + lower[gaze],
            crease_above_mm=max(look.crease_mm + 0.6 * follow, 0.9),
        )
    return Anatomy(
        mrd1_mm=mrd1,
        mrd2_mm=mrd2,
        lf_mm=lf,
        tilt_deg=tilt,
        anchor_x_mm=anchor,
        upper_peak=float(rng.uniform(-0.12, 0.25)),
        lower_peak=float(rng.uniform(-0.35, 0.05)),
        upper_power=(float(rng.uniform(1.9, 2.5)), float(rng.uniform(0.7, 1.15))),
        lower_power=(float(rng.uniform(1.8, 2.4)), float(rng.uniform(0.7, 1.0))),
        light=(float(rng.normal(0, 0.5)), float(rng.normal(-0.25, 0.35))),
        poses=poses,
    )


def canthi(look: Look, eye: Anatomy, pose: Pose) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the nasal and the temporal canthus, (x, y) in mm of the image frame."""
    angle = np.deg2rad(eye.tilt_deg)
    half_x = look.width_mm / 2 * float(np.cos(angle))
    # A positive tilt lifts the temporal canthus, which is on the left in a right eye.
    half_y = look.width_mm / 2 * float(np.sin(angle))
    cx, cy = pose.centre_mm
    return (cx + half_x, cy + half_y), (cx - half_x, cy - half_y)


def _arch(t: Array, peak: float, power: tuple[float, float]) -> Array:
    """Return a smooth arch over t in −1..1: 0 at the ends, 1 at ``peak``, tapering nasally."""
    t = np.clip(t, -1, 1)
    moved = (t - peak) / (1 - peak * t)
    base = np.maximum(1 - np.abs(moved) ** power[0], 0)
    # The nasal end narrows to the caruncle, the temporal end meets at an open angle.
    return np.where(moved > 0, base ** (power[1] + 0.35), base ** power[1])


def margins(look: Look, eye: Anatomy, pose: Pose, x_mm: Array) -> tuple[Array, Array, Array]:
    """Return y of the upper and of the lower margin, and t in −1..1 between the canthi, per x."""
    nasal, temporal = canthi(look, eye, pose)
    anchor = pose.centre_mm[0] + eye.anchor_x_mm
    xs = np.append(x_mm, anchor)
    half = (nasal[0] - temporal[0]) / 2
    t = (xs - pose.centre_mm[0]) / half
    line = pose.centre_mm[1] + t * (nasal[1] - temporal[1]) / 2
    ups = _arch(t, eye.upper_peak, eye.upper_power)
    lows = _arch(t, eye.lower_peak, eye.lower_power)
    upper = line + ups * ((pose.upper_mm - line[-1]) / ups[-1])
    lower = line + lows * ((pose.lower_mm - line[-1]) / lows[-1])
    # Lids touch, they never cross; the opening at the anchor is kept by ``draw_anatomy``.
    return np.minimum(upper, lower)[:-1], lower[:-1], t[:-1]
