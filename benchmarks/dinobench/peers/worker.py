"""One process per candidate, asked in turn: a model alone in its process, as in an app.

While one answers, the others wait at a pipe and cost nothing. A runtime that dies takes only its
own candidate along.
"""

import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import numpy as np

from dinobench.peers.candidates import Candidate
from dinobench.peers.runners import open_runner, prepare

START_S = 120.0
TURN_S = 300.0


class WorkerError(Exception):
    """A candidate that cannot be loaded or run; the message is the reason."""


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """What one turn measured, per run: seconds by the clock, and of the process's CPU time."""

    wall_s: tuple[float, ...]
    cpu_s: tuple[float, ...]


class Worker:
    """A running process that holds one candidate.

    Args:
        candidate: what to load.
        folder: where its artifact is.
        images: (N, S, S, 3) uint8; the first one is what is timed.
    """

    def __init__(self, candidate: Candidate, folder: Path, images: np.ndarray) -> None:
        self.candidate = candidate
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, candidate, folder, images), daemon=True
        )
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Number of its process."""
        return self._process.pid or 0

    def answers(self) -> np.ndarray:
        """Return the first output for every image, (N, …), float64."""
        return np.asarray(self._ask("answers", START_S), np.float64)

    def turn(self, runs: int) -> Turn:
        """Run once untimed, then ``runs`` times."""
        wall, cpu = self._ask(runs, TURN_S)
        return Turn(wall_s=tuple(wall), cpu_s=tuple(cpu))

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def _ask(self, question: str | int, limit_s: float):
        try:
            self._pipe.send(question)
            if not self._pipe.poll(limit_s):
                raise WorkerError(f"no answer in {limit_s:g} s")
            kind, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise WorkerError("its process ended") from error
        if kind == "error":
            raise WorkerError(value)
        return value


def _serve(pipe: Connection, candidate: Candidate, folder: Path, images: np.ndarray) -> None:
    """Answer until the pipe is closed."""
    try:
        runner = open_runner(candidate, folder)
    except Exception as error:  # each runtime raises types of its own
        failure = " ".join(str(error).split())[:200]
        runner = None
    prepared = prepare(images[0], candidate)
    while True:
        try:
            question = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        if runner is None:
            pipe.send(("error", failure))
            continue
        try:
            if question == "answers":
                rows = [runner.run(prepare(image, candidate))[0] for image in images]
                pipe.send(("value", np.stack(rows)))
                continue
            runner.run(prepared)
            wall, cpu = [], []
            for _ in range(question):
                start, start_cpu = time.perf_counter(), time.process_time()
                runner.run(prepared)
                wall.append(time.perf_counter() - start)
                cpu.append(time.process_time() - start_cpu)
            pipe.send(("value", (wall, cpu)))
        except Exception as error:
            pipe.send(("error", " ".join(str(error).split())[:200]))
