"""One image size from end to end: make, check that all agree, time in turns, judge, profile."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np

from dinobench.peers.agreement import Agreement, check
from dinobench.peers.cache import Folder, Made
from dinobench.peers.candidates import ROOFLINE, Candidate
from dinobench.peers.making import EXPECTED, IMAGES, SHAPE
from dinobench.peers.profile import profile
from dinobench.peers.result import GOALS, Row, SizeResult, judge
from dinobench.peers.roofline import count_flops
from dinobench.peers.timing import RUNS_PER_TURN, cpu_median, interleave, ratio, wall_median
from dinobench.peers.worker import Turn, Worker, WorkerError


class NoModelError(Exception):
    """The model that all candidates are made of cannot be made; the message is the reason."""


def measure_size(
    size: int,
    hot: bool,
    runs: int,
    candidates: Sequence[Candidate],
    root: Path,
    profiles: bool,
    say: Callable[[str], None],
) -> SizeResult:
    """Make, check, time and profile all candidates at one image size.

    Args:
        size: pixels of a side.
        hot: plant outlier channels.
        runs: timed runs of each, at least.
        candidates: what to compare; those that cannot be made are said and left out.
        root: where artifacts are kept.
        profiles: also time kinds of operations.
        say: told what is being done.

    Raises:
        NoModelError: the common model cannot be made.
        MismatchError: a float32 candidate computes something else.
    """
    folder = Folder(path=root / f"{size}{'-hot' if hot else ''}", size=size, hot=hot)
    folder.path.mkdir(parents=True, exist_ok=True)
    common = folder.make_common()
    if common.reason:
        raise NoModelError(f"the model at {size} cannot be made: {common.reason}")
    made: dict[str, Made] = {}
    for candidate in candidates:
        say(f"{size}: make {candidate.name}")
        made[candidate.name] = folder.make(candidate)
    skipped = {name: result.reason for name, result in made.items() if result.reason}
    images, expected = np.load(folder.path / IMAGES), np.load(folder.path / EXPECTED)
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        agreements: dict[str, Agreement] = {}
        for candidate in candidates:
            if candidate.name in skipped:
                continue
            worker = Worker(candidate, folder.path, images)
            stack.callback(worker.close)
            try:
                answers = worker.answers()
            except WorkerError as error:
                skipped[candidate.name] = str(error)
                continue
            workers[candidate.name] = worker
            if candidate.family != "roofline":
                agreements[candidate.name] = check(candidate, answers, expected)
        turns = interleave(workers, runs, lambda done, of: say(f"{size}: round {done} of {of}"))
    goals, missing = judge(GOALS, turns, size)
    judged = {name for goal in goals for name in (goal.above, goal.below)} | {ROOFLINE.name}
    rows = []
    for candidate in candidates:
        name = candidate.name
        if name in skipped:
            rows.append(Row(name=name, what=candidate.what, skipped=skipped[name]))
            continue
        row = _row(candidate, folder, turns, agreements.get(name), made[name].note)
        if profiles and name in judged:
            row = msgspec.structs.replace(row, profile=profile(candidate, folder.path, images[0]))
        rows.append(row)
    return SizeResult(
        size=size,
        hot=hot,
        runs=-(-runs // RUNS_PER_TURN) * RUNS_PER_TURN,
        gflop=count_flops(SHAPE, size) / 1e9,
        rows=tuple(rows),
        goals=goals,
        missing=missing,
    )


def _row(
    candidate: Candidate,
    folder: Folder,
    turns: dict[str, list[Turn]],
    agreement: Agreement | None,
    note: str,
) -> Row:
    own, roofline = turns[candidate.name], turns.get(ROOFLINE.name)
    artifact = folder.path / candidate.file
    files = [artifact, *([artifact.with_suffix(".bin")] if artifact.suffix == ".xml" else [])]
    return Row(
        name=candidate.name,
        what=candidate.what,
        size_mb=round(sum(file.stat().st_size for file in files) / 1e6, 2),
        wall_ms=round(wall_median(own) * 1e3, 2),
        cpu_ms=round(cpu_median(own) * 1e3, 2),
        of_roofline=round(ratio(own, roofline).value, 3) if roofline else 0.0,
        worst=agreement.worst if agreement else None,
        sqnr_db=round(agreement.sqnr_db, 1) if agreement else None,
        note=note,
    )
