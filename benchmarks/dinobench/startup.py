"""How soon the command answers: ``python -m dinobench.startup`` times ``dinoexport --help``."""

import sys
from statistics import median
from typing import Annotated

import msgspec
import typer

from dinobench.machine import busy_note, describe_machine
from dinobench.process import measure

LIMIT_S = 0.5
WARMUP = 2


def run(
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs.")] = 11,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the median time of ``dinoexport --help`` in a new process."""
    note = busy_note()
    command = [sys.executable, "-m", "dinoexport", "--help"]
    # The first runs write byte code and fill the file cache, as an installation does once.
    times = [measure(command) for _ in range(WARMUP + repeats)][WARMUP:]
    failed = next((cost for cost in times if cost.status), None)
    if failed:
        typer.echo(failed.stderr, err=True)
        raise typer.Exit(2)
    median_s = median(cost.wall_s for cost in times)
    passed = median_s < LIMIT_S
    if json:
        facts = {
            "schema": "dinobench.startup",
            "schema_version": 1,
            "machine": msgspec.to_builtins(describe_machine()),
            "note": note,
            "median_s": round(median_s, 3),
            "slowest_s": round(max(cost.wall_s for cost in times), 3),
            "repeats": repeats,
            "limit_s": LIMIT_S,
            "passed": passed,
        }
        typer.echo(msgspec.json.format(msgspec.json.encode(facts), indent=2).decode())
    else:
        typer.echo(
            f"dinoexport --help: median {median_s:.2f} s of {repeats} runs, {LIMIT_S} allowed"
            + (f" ({note})" if note else "")
        )
    raise typer.Exit(0 if passed else 1)


if __name__ == "__main__":
    typer.run(run)
