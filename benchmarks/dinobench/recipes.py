"""What each recipe costs and saves: ``python -m dinobench.recipes`` builds the embedded model at
each of them, for every target that has it, and prints sizes and worst errors.

Each recipe is one cold process; what is known is kept in a file, so that a run that was cut off
goes on. Exit status: 0 all builds passed parity, 1 one did not.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from dinobench.machine import Machine, busy_note, describe_machine
from dinobench.process import measure
from dinobench.result import BuildCost, read_build

TARGETS = {"onnx": "ONNX", "coreml": "Core ML", "tflite": "TFLite"}
MODEL = "embedded"
FILE = "recipes.json"
LACKING = "-"
"""What ``dinoexport list recipes`` says where a target has no such recipe."""


class RecipeReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All builds so far, one for each recipe."""

    schema: str = "dinobench.recipes"
    schema_version: int = 1
    machine: Machine
    note: str = ""
    calibration_count: int | None
    builds: tuple[BuildCost, ...] = ()


def run(
    recipes: Annotated[str, typer.Option(help="With commas; all but fp32 if left out.")] = "",
    calibration_count: Annotated[
        int | None, typer.Option(help="As `dinoexport build` takes it.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder that keeps what is known.")] = Path("recipes"),
) -> None:
    """Build the embedded eyelid model at each recipe; print sizes and worst errors per target."""
    listed = _list_recipes()
    wanted = recipes.split(",") if recipes else [name for name in listed if name != "fp32"]
    odd = next((name for name in wanted if name not in listed), None)
    if odd is not None:
        raise typer.BadParameter(f"--recipes '{odd}'; accepted: {', '.join(listed)}")
    out.mkdir(parents=True, exist_ok=True)
    path = out / FILE
    known = {build.precision: build for build in _read(path, calibration_count)}
    report = RecipeReport(
        machine=describe_machine(), note=busy_note(), calibration_count=calibration_count
    )
    for name in wanted:
        if name not in known:
            typer.echo(f"build {name}", err=True)
            known[name] = _build(name, supporting(listed[name]), calibration_count)
            report = msgspec.structs.replace(report, builds=tuple(known.values()))
            path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))
    builds = [known[name] for name in wanted]
    for line in (*table(builds), *problems(builds)):
        typer.echo(line)
    raise typer.Exit(0 if all(build.passed for build in builds) else 1)


def supporting(row: dict[str, str]) -> list[str]:
    """Return the targets that have a recipe, from its row of ``dinoexport list recipes``."""
    return [name for name in TARGETS if row.get(name, LACKING) != LACKING]


def table(builds: Sequence[BuildCost]) -> list[str]:
    """Render builds as Markdown: per target the size in MB and the worst error of any output."""
    unit = next((a.unit for build in builds for a in build.artifacts), "")
    lines = [
        f"| recipe | {' | '.join(f'{name} MB, {unit}' for name in TARGETS.values())} |",
        f"|---|{'---|' * len(TARGETS)}",
    ]
    for build in builds:
        found = {a.target: f"{a.size_mb:.2f}, {_short(a.worst_error)}" for a in build.artifacts}
        lines.append(
            f"| {build.precision} | {' | '.join(found.get(name, '–') for name in TARGETS)} |"
        )
    return lines


def problems(builds: Sequence[BuildCost]) -> list[str]:
    """Return what failed, a line each."""
    found = [f"{b.precision}: {b.error}" for b in builds if b.error]
    return found + [
        f"{b.precision} for {a.target}: parity failed"
        for b in builds
        for a in b.artifacts
        if not a.passed
    ]


def _short(error: float) -> str:
    return f"{error:.3f}" if error < 0.01 else f"{error:.2f}"


def _list_recipes() -> dict[str, dict[str, str]]:
    found = measure([sys.executable, "-m", "dinoexport", "list", "recipes", "--json"])
    if found.status:
        typer.echo(found.stderr, err=True)
        raise typer.Exit(2)
    return msgspec.json.decode(found.stdout)


def _read(path: Path, calibration_count: int | None) -> tuple[BuildCost, ...]:
    try:
        report = msgspec.json.decode(path.read_bytes(), type=RecipeReport)
    except (OSError, msgspec.MsgspecError):
        return ()
    return report.builds if report.calibration_count == calibration_count else ()


def _build(recipe: str, targets: Sequence[str], calibration_count: int | None) -> BuildCost:
    names = ",".join(targets)
    with tempfile.TemporaryDirectory(prefix="dinobench-") as folder:
        command = [sys.executable, "-m", "dinoexport", "build", "--task", "eyelid", "--json"]
        command += ["--target", names, "--precision", recipe, "--out", folder]
        if calibration_count is not None:
            command += ["--calibration-count", str(calibration_count)]
        cost = measure(command)
    figures = (cost.wall_s, cost.peak_bytes / 1e9)
    return read_build(MODEL, names, recipe, cost.status, cost.stdout, figures)


if __name__ == "__main__":
    typer.run(run)
