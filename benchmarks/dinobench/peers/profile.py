"""Where a candidate's time goes: per kind of operation, from the runtime's own profiler.

onnxruntime and OpenVINO have one. LiteRT's Python interface gives none for what XNNPACK runs, but
its kernels have names, and Linux's ``perf``, where it is installed, samples which one runs. A
profiled run is a run of its own, apart from what is timed, and its operations add up to less than a
timed run: what lies between them is nobody's.
"""

import json
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np

from dinobench.peers.candidates import Candidate
from dinobench.peers.runners import OnnxRunner, OpenvinoRunner, prepare
from dinobench.peers.timing import wall_median
from dinobench.peers.worker import Worker

RUNS = 5
SAMPLED_S = 4.0
"""Of runs that are sampled, at least: 1,000 samples a second."""


class OperationTime(msgspec.Struct, frozen=True, kw_only=True):
    """All operations of one kind, in one run."""

    kind: str
    count: int
    """0 where that is not known."""
    ms: float


def profile(candidate: Candidate, folder: Path, image: np.ndarray) -> tuple[OperationTime, ...]:
    """Return the times per kind of operation, longest first; nothing where there is no profiler."""
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
    return _sample(candidate, folder, image)


def _sample(candidate: Candidate, folder: Path, image: np.ndarray) -> tuple[OperationTime, ...]:
    """Sample a process that runs a candidate; nothing where that cannot be done."""
    if shutil.which("perf") is None:
        return ()
    worker = Worker(candidate, folder, image[np.newaxis])
    try:
        runs = max(RUNS, round(SAMPLED_S / wall_median([worker.turn(RUNS)])))
        with tempfile.TemporaryDirectory(prefix="dinobench-") as scratch:
            samples = Path(scratch) / "perf.data"
            command = ["perf", "record", "-q", "-e", "cpu-clock", "-F", "1000", "-o", str(samples)]
            sampler = subprocess.Popen(
                [*command, "-p", str(worker.pid)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            # It says nowhere when it has begun; runs before that are not sampled, no more.
            time.sleep(0.5)
            run_ms = wall_median([worker.turn(runs)]) * 1e3
            sampler.send_signal(signal.SIGINT)
            sampler.wait()
            command = ["perf", "report", "-i", str(samples), "--no-children", "--stdio"]
            report = subprocess.run(
                [*command, "-F", "overhead,symbol"],
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            ).stdout
    finally:
        worker.close()
    rows = sum_kinds((kind, share * run_ms) for kind, share in read_samples(report))
    # A kernel is one symbol, however often it runs.
    return tuple(msgspec.structs.replace(row, count=0) for row in rows)


def read_samples(report: str) -> list[tuple[str, float]]:
    """Read a report of ``perf``: per symbol its kind of kernel and its share of the samples.

    XNNPACK names a kernel by type, work and form, ``xnn_f32_gemm_minmax_ukernel_7x32__avx512f``:
    the kind is what stands before the form. Everything else is ``not a kernel``.
    """
    found = []
    for line in report.splitlines():
        match = re.match(r"\s*([\d.]+)%\s.*?\[[.k]\]\s+(\S+)", line)
        if match is None:
            continue
        kernel = re.match(r"xnn_(\w+?)(?:_minmax|_fp32)*_ukernel", match[2])
        kind = kernel[1].removesuffix("_minmax") if kernel else "not a kernel"
        found.append((kind, float(match[1]) / 100))
    return found


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
