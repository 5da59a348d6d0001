"""``python -m dinobench.peers``: make what is not there yet, check that all agree, time, and judge.

Exit status: 0 all that was asked is reached, 1 something is not, 2 the float32 candidates do not
compute the same, so that nothing was timed.
"""

import tempfile
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from dinobench.machine import busy_note, describe_machine
from dinobench.peers.agreement import MismatchError
from dinobench.peers.cache import TOOLS
from dinobench.peers.candidates import OUR_PRECISIONS, all_candidates
from dinobench.peers.measuring import NoModelError, measure_size
from dinobench.peers.result import PeersReport
from dinobench.peers.table import render

VERSIONS = ("onnxruntime", "ai-edge-litert", *TOOLS)


def run(
    size: Annotated[
        list[int] | None, typer.Option(help="Pixels of a side; may be given again. [default: 224]")
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Timed runs of each candidate, at least.")] = 30,
    precision: Annotated[
        list[str] | None, typer.Option(help="Of ours; may be given again. [default: all in table]")
    ] = None,
    hot: Annotated[bool, typer.Option("--hot", help="Plant outlier channels.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Keep what is made here, so that a second run only times.")
    ] = None,
    profiles: Annotated[
        bool, typer.Option("--profile/--no-profile", help="Time per kind of operation.")
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print our speed beside the peers', and the ratios that are to be reached."""
    note = busy_note()
    candidates = all_candidates(tuple(precision or OUR_PRECISIONS))
    with ExitStack() as stack:
        root = out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dinobench-")))
        try:
            sizes = tuple(
                measure_size(side, hot, runs, candidates, root, profiles, _say)
                for side in size or (224,)
            )
        except (MismatchError, NoModelError) as error:
            _say(str(error))
            raise typer.Exit(2) from error
    report = PeersReport(
        machine=describe_machine(),
        versions={name: _version(name) for name in VERSIONS},
        note=note,
        sizes=sizes,
        passed=all(
            not result.missing and all(goal.reached is not False for goal in result.goals)
            for result in sizes
        ),
    )
    if json:
        typer.echo(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    else:
        typer.echo(render(report), nl=False)
    raise typer.Exit(0 if report.passed else 1)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _say(text: str) -> None:
    typer.echo(text, err=True)


if __name__ == "__main__":
    typer.run(run)
