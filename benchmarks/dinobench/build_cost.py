"""What builds cost: ``python -m dinobench.build_cost`` builds as a user would, and measures.

Exit status: 0 all limits hold, 1 one does not.
"""

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from dinobench.machine import busy_note, describe_machine
from dinobench.process import measure
from dinobench.result import (
    BuildCost,
    BuildCostReport,
    Limit,
    judge,
    read_build,
    render_build_cost,
)

EMBEDDED, VITS14 = "embedded", "ViT-S/14, 224, random weights"
LIMITS = (
    Limit(model=EMBEDDED, what="one target", wall_s=60, peak_gb=3),
    Limit(model=VITS14, what="all three targets", wall_s=240, peak_gb=6),
)
PLAN = {EMBEDDED: ("onnx", "coreml", "tflite"), VITS14: ("all",)}
"""Model → what is asked of one process each."""
MODELS = {"embedded": (EMBEDDED,), "vits14": (VITS14,), "all": (EMBEDDED, VITS14)}
PRECISIONS = {"fp16": ("fp16",), "fp32": ("fp32",), "all": ("fp32", "fp16")}


def run(
    model: Annotated[str, typer.Option(help="embedded, vits14 or all.")] = "all",
    precision: Annotated[str, typer.Option(help="fp16, fp32 or all.")] = "all",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Built in the place of the embedded checkpoint.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Build per model, target and precision; print wall time, peak memory, size and verdict."""
    models = _choose(MODELS, model, "--model")
    precisions = _choose(PRECISIONS, precision, "--precision")
    note = busy_note()
    with tempfile.TemporaryDirectory(prefix="dinobench-") as folder:
        builds = tuple(
            build
            for name in models
            for build in _build_all(name, precisions, _checkpoint(name, checkpoint, folder))
        )
    limits = judge(LIMITS, builds)
    report = BuildCostReport(
        machine=describe_machine(),
        note=note,
        builds=builds,
        limits=limits,
        passed=bool(limits) and all(result.holds for result in limits),
    )
    if json:
        typer.echo(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    else:
        typer.echo(render_build_cost(report), nl=False)
    raise typer.Exit(0 if report.passed else 1)


def _choose(table: dict[str, tuple[str, ...]], name: str, option: str) -> tuple[str, ...]:
    if name not in table:
        raise typer.BadParameter(f"{option} '{name}'; accepted: {', '.join(table)}")
    return table[name]


def _checkpoint(model: str, given: Path | None, folder: str) -> Path | None:
    """Return the file to build; None is the embedded one."""
    if model == EMBEDDED:
        return given
    path = Path(folder) / "vits14.safetensors"
    made = measure([sys.executable, "-m", "dinobench.random_checkpoint", str(path)])
    if made.status:
        typer.echo(made.stderr, err=True)
        raise typer.Exit(2)
    return path


def _build_all(model: str, precisions: tuple[str, ...], checkpoint: Path | None) -> list[BuildCost]:
    builds = []
    for precision in precisions:
        for target in PLAN[model]:
            typer.echo(f"build {model}: {target}, {precision}", err=True)
            builds.append(measure_build(model, target, precision, checkpoint))
    return builds


def measure_build(model: str, target: str, precision: str, checkpoint: Path | None) -> BuildCost:
    """Run one ``dinoexport build`` into a folder that is thrown away."""
    with tempfile.TemporaryDirectory(prefix="dinobench-") as out:
        command = [sys.executable, "-m", "dinoexport", "build", "--task", "eyelid"]
        command += ["--target", target, "--precision", precision, "--out", out, "--json"]
        if checkpoint:
            command += ["--checkpoint", str(checkpoint)]
        cost = measure(command)
    figures = (cost.wall_s, cost.peak_bytes / 1e9)
    return read_build(model, target, precision, cost.status, cost.stdout, figures)


if __name__ == "__main__":
    typer.run(run)
