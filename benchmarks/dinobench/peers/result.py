"""What one run found: schema'd, and the limits that it is held against."""

from collections.abc import Mapping, Sequence

import msgspec

from dinobench.machine import Machine
from dinobench.peers.candidates import OPENVINO_INT8, PEER_ONNX, PEER_TFLITE
from dinobench.peers.profile import OperationTime
from dinobench.peers.timing import Ratio, ratio, wall_median
from dinobench.peers.worker import Turn

SCHEMA_VERSION = 1


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """A ratio to reach: the fastest of some candidates over the fastest of others."""

    what: str
    above: tuple[str, ...]
    below: tuple[str, ...]
    limits: dict[int, float]
    """{pixels of a side: at most}."""


def _ours(target: str, *forms: str) -> tuple[str, ...]:
    return tuple(f"ours-{target}-{form}" for form in forms)


INT8 = ("w8a8", "w8a8-dynamic")
FLOAT = ("fp32", "fp32-cpu")
GOALS = (
    Goal(
        what="ONNX fp32 ÷ the peer's best export",
        above=_ours("onnx", *FLOAT),
        below=tuple(candidate.name for candidate in PEER_ONNX),
        limits={224: 0.85, 518: 0.90},
    ),
    Goal(
        what="ONNX int8 ÷ our fp32",
        above=_ours("onnx", *INT8),
        below=_ours("onnx", *FLOAT),
        limits={224: 0.33, 518: 0.50},
    ),
    Goal(
        what="TFLite fp32 ÷ litert-torch's",
        above=_ours("tflite", "fp32"),
        below=(PEER_TFLITE.name,),
        limits={224: 0.90, 518: 0.85},
    ),
    Goal(
        what="TFLite int8 ÷ our fp32",
        above=_ours("tflite", *INT8),
        below=_ours("tflite", "fp32"),
        limits={224: 0.25, 518: 0.48},
    ),
    Goal(
        what="ONNX int8 ÷ OpenVINO int8",
        above=_ours("onnx", *INT8),
        below=(OPENVINO_INT8.name,),
        limits={224: 1.0, 518: 1.0},
    ),
)


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One candidate; without times where it could not be made or run."""

    name: str
    what: str
    size_mb: float = 0.0
    wall_ms: float = 0.0
    cpu_ms: float = 0.0
    """Of its process; less than the wall where something else ran instead."""
    of_roofline: float = 0.0
    """Its time over that of the matrix products alone."""
    worst: float | None = None
    """Largest difference of a probability from PyTorch's."""
    sqnr_db: float | None = None
    note: str = ""
    skipped: str = ""
    profile: tuple[OperationTime, ...] = ()


class GoalResult(msgspec.Struct, frozen=True, kw_only=True):
    """A goal, and what was measured of it."""

    what: str
    above: str
    below: str
    ratio: Ratio
    limit: float | None
    reached: bool | None
    """None at a size that has no limit."""


class SizeResult(msgspec.Struct, frozen=True, kw_only=True):
    """Everything at one image size."""

    size: int
    hot: bool
    runs: int
    """Timed runs of each candidate."""
    gflop: float
    """Of the model's matrix products."""
    rows: tuple[Row, ...]
    goals: tuple[GoalResult, ...]
    missing: tuple[str, ...]
    """Goals of which a side could not be made."""


class PeersReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one run of ``dinobench.peers`` found; host figures."""

    schema: str = "dinobench.peers"
    schema_version: int = SCHEMA_VERSION
    machine: Machine
    versions: dict[str, str]
    note: str = ""
    sizes: tuple[SizeResult, ...]
    passed: bool


def judge(
    goals: Sequence[Goal], turns: Mapping[str, Sequence[Turn]], size: int
) -> tuple[tuple[GoalResult, ...], tuple[str, ...]]:
    """Hold what was timed against the goals.

    Args:
        goals: what to reach.
        turns: {candidate: its turns} of one interleaved run.
        size: pixels of a side.

    Returns:
        The goals with their ratios, and the names of those that cannot be judged.
    """
    results, missing = [], []
    for goal in goals:
        above, below = (_fastest(names, turns) for names in (goal.above, goal.below))
        if above is None or below is None:
            missing.append(goal.what)
            continue
        found = ratio(turns[above], turns[below])
        limit = goal.limits.get(size)
        results.append(
            GoalResult(
                what=goal.what,
                above=above,
                below=below,
                ratio=found,
                limit=limit,
                reached=None if limit is None else found.value <= limit,
            )
        )
    return tuple(results), tuple(missing)


def _fastest(names: Sequence[str], turns: Mapping[str, Sequence[Turn]]) -> str | None:
    timed = [name for name in names if turns.get(name)]
    return min(timed, key=lambda name: wall_median(turns[name])) if timed else None
