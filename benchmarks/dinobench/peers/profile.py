"""Where a candidate's time goes: per kind of operation, from the runtime's own profiler.

onnxruntime and OpenVINO have one; LiteRT's Python interface gives none for what XNNPACK runs. A
profiled run is a run of its own, apart from what is timed, and its operations add up to less than a
timed run: what lies between them is nobody's.
"""

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np

from dinobench.peers.candidates import Candidate
from dinobench.peers.runners import OnnxRunner, OpenvinoRunner, prepare

RUNS = 5


class OperationTime(msgspec.Struct, frozen=True, kw_only=True):
    """All operations of one kind, in one run."""

    kind: str
    count: int
    ms: float


def profile(candidate: Candidate, folder: Path, image: np.ndarray) -> tuple[OperationTime, ...]:
    """Return the times per kind of operation, longest first; nothing for LiteRT."""
    pixels = prepare(image, candidate)
    path = folder / candidate.file
    if candidate.runtime == "onnxruntime":
        with tempfile.TemporaryDirectory(prefix="dinobench-") as scratch:
            runner = OnnxRunner(path, profile=Path(scratch) / "profile")
            for _ in range(RUNS):
                runner.run(pixels)
            events = json.loads(Path(runner.session.end_profiling()).read_text(encoding="utf-8"))
        return sum_kinds(read_onnx_events(events))
    if candidate.runtime == "openvino":
        counted = OpenvinoRunner(path, profile=True)
        return sum_kinds(counted.profiled(pixels, RUNS))
    return ()


def read_onnx_events(events: Iterable[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """Read onnxruntime's trace: per node its kind and its median time in ms over all runs."""
    kinds: dict[str, str] = {}
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            kinds[name] = event["args"]["op_name"]
            times[name].append(event["dur"] / 1e3)
    return [(kinds[name], median(values)) for name, values in times.items()]


def sum_kinds(nodes: Iterable[tuple[str, float]]) -> tuple[OperationTime, ...]:
    """Add up nodes of a kind; those of no time are left out."""
    grouped: dict[str, list[float]] = defaultdict(list)
    for kind, ms in nodes:
        grouped[kind].append(ms)
    rows = [
        OperationTime(kind=kind, count=len(values), ms=round(sum(values), 3))
        for kind, values in grouped.items()
    ]
    return tuple(sorted((r for r in rows if r.ms > 0), key=lambda r: (-r.ms, r.kind)))
