"""Run a command to its end and measure it: wall time, and the memory of its largest process."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec


class ProcessCost(msgspec.Struct, frozen=True, kw_only=True):
    """What one command cost, and what it said; ``status`` is negative for a signal."""

    status: int
    wall_s: float
    cpu_s: float
    peak_bytes: int
    """Largest resident size of any one process of the tree: of those, not of their sum."""
    stdout: str
    stderr: str


def measure(command: Sequence[str], environment: Mapping[str, str] | None = None) -> ProcessCost:
    """Run a command and measure it.

    The command writes into files, so that a full pipe cannot hold it up. Its peak is at least that
    of this process when it was started (Linux counts from before ``exec``), which is small.

    Args:
        command: program and arguments.
        environment: added to this process's own.
    """
    with tempfile.TemporaryDirectory(prefix="dinobench-") as folder:
        out, err = Path(folder) / "stdout", Path(folder) / "stderr"
        with out.open("wb") as stdout, err.open("wb") as stderr:
            start = time.perf_counter()
            child = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env={**os.environ, **(environment or {})},
            )
            status, cpu_s, usage = _wait(child)
            wall_s = time.perf_counter() - start
        return ProcessCost(
            status=status,
            wall_s=wall_s,
            cpu_s=cpu_s,
            peak_bytes=usage,
            stdout=out.read_text("utf-8", errors="replace"),
            stderr=err.read_text("utf-8", errors="replace"),
        )


def _wait(child: subprocess.Popen) -> tuple[int, float, int]:
    """Return exit status, processor time and peak; the child does not outlive an interrupt."""
    try:
        _, raw, usage = os.wait4(child.pid, 0)
    except BaseException:
        child.terminate()
        child.wait()
        raise
    # Popen must not wait for a process that is gone already.
    child.returncode = os.waitstatus_to_exitcode(raw)
    # Linux counts kibibytes, macOS bytes.
    cpu_s = usage.ru_utime + usage.ru_stime
    return child.returncode, cpu_s, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
