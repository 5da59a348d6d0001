"""How builds grow with the backbone: ``python -m dinobench.scale`` builds S, B and L, and measures.

Each build is one cold process; what is known is kept in a file, so that a run that was cut off goes
on. Exit status: 0 all limits hold, 1 one does not.
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
from dinobench.result import Artifact, read_build

WEIGHTS_GB = {"s": 0.088, "b": 0.346, "l": 1.217, "g": 4.546}
"""Of the float32 weights of each variant (METHODS A1)."""
MAX_GROWTH = 4.0
"""Bytes of peak memory for each further byte of float32 weights."""
LARGE_LIMIT = (25 * 60.0, 24.0)
"""Seconds and GB that all three targets of ViT-L may take."""
FILE = "scale.json"


class ScaledBuild(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One build; its key is all but what it cost."""

    variant: str
    side_px: int
    precision: str
    target: str
    wall_s: float
    cpu_s: float
    peak_gb: float
    artifacts: tuple[Artifact, ...] = ()
    error: str = ""

    @property
    def key(self) -> tuple[str, int, str, str]:
        """What was built."""
        return self.variant, self.side_px, self.precision, self.target


class ScaleReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All builds so far."""

    schema: str = "dinobench.scale"
    schema_version: int = 1
    machine: Machine
    note: str = ""
    builds: tuple[ScaledBuild, ...] = ()


def run(
    variants: Annotated[str, typer.Option(help="Of s, b, l, g, with commas.")] = "s,b,l",
    sizes: Annotated[str, typer.Option(help="Sides in pixels, with commas.")] = "224,518",
    precisions: Annotated[str, typer.Option(help="Recipes, with commas.")] = "fp16,w8a8",
    target: Annotated[str, typer.Option(help="As `dinoexport build` takes it.")] = "all",
    out: Annotated[Path, typer.Option(help="Folder that keeps what is known.")] = Path("scale"),
) -> None:
    """Build each variant at each size and precision; print wall time, peak memory and verdicts."""
    wrong = next((side for side in sizes.split(",") if not side.isdecimal()), None)
    if wrong is not None:
        raise typer.BadParameter(f"--sizes '{wrong}'; accepted: pixels, such as 224,518")
    wanted = [
        (variant, int(side), precision, target)
        for variant in variants.split(",")
        for side in sizes.split(",")
        for precision in precisions.split(",")
    ]
    odd = next((variant for variant, *_ in wanted if variant not in WEIGHTS_GB), None)
    if odd is not None:
        raise typer.BadParameter(f"--variants '{odd}'; accepted: {', '.join(WEIGHTS_GB)}")
    out.mkdir(parents=True, exist_ok=True)
    path = out / FILE
    known = {build.key: build for build in _read(path)}
    report = ScaleReport(machine=describe_machine(), note=busy_note())
    for key in wanted:
        if key not in known:
            typer.echo(f"build {' '.join(map(str, key))}", err=True)
            known[key] = _build(*key)
            report = msgspec.structs.replace(report, builds=tuple(known.values()))
            path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))
    builds = [known[key] for key in wanted]
    problems = judge(builds)
    for line in (*table(builds), "", *problems):
        typer.echo(line)
    raise typer.Exit(1 if problems else 0)


def _read(path: Path) -> tuple[ScaledBuild, ...]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=ScaleReport).builds
    except (OSError, msgspec.MsgspecError):
        return ()


def _build(variant: str, side: int, precision: str, target: str) -> ScaledBuild:
    with tempfile.TemporaryDirectory(prefix="dinobench-") as folder:
        checkpoint = Path(folder) / f"vit{variant}14.safetensors"
        command = [sys.executable, "-m", "dinobench.random_checkpoint", str(checkpoint)]
        made = measure([*command, f"dinov2_vit{variant}14", str(side)])
        if made.status:
            typer.echo(made.stderr, err=True)
            raise typer.Exit(2)
        command = [sys.executable, "-m", "dinoexport", "build", "--task", "eyelid", "--json"]
        command += ["--target", target, "--precision", precision, "--out", f"{folder}/out"]
        cost = measure([*command, "--checkpoint", str(checkpoint)])
    figures = (cost.wall_s, cost.peak_bytes / 1e9)
    # A build that was killed for memory prints nothing; its last step tells where.
    read = read_build(variant, target, precision, cost.status, cost.stdout, figures)
    error = read.error and f"{read.error}; {(cost.stderr.splitlines() or [''])[-1]}"
    return ScaledBuild(
        variant=variant,
        side_px=side,
        precision=precision,
        target=target,
        wall_s=round(cost.wall_s, 1),
        cpu_s=round(cost.cpu_s, 1),
        peak_gb=round(cost.peak_bytes / 1e9, 2),
        artifacts=read.artifacts,
        error=error,
    )


def table(builds: Sequence[ScaledBuild]) -> list[str]:
    """Render builds as Markdown."""
    lines = [
        "| ViT | px | recipe | wall s | CPU s | peak GB | fp32 GB | artifacts MB | worst error | |",
        "|---|--:|---|--:|--:|--:|--:|---|--:|---|",
    ]
    for b in builds:
        sizes = ", ".join(f"{a.target} {a.size_mb:.0f}" for a in b.artifacts)
        worst = max((a.worst_error for a in b.artifacts), default=None)
        error = "" if worst is None else f"{worst:.2g} {b.artifacts[0].unit}"
        passed = all(a.passed for a in b.artifacts)
        verdict = b.error or ("pass" if passed else "FAIL")
        cost = f"{b.wall_s:.0f} | {b.cpu_s:.0f} | {b.peak_gb:.1f} | {WEIGHTS_GB[b.variant]:.2f}"
        lines.append(
            f"| {b.variant.upper()} | {b.side_px} | {b.precision} | {cost} | {sizes} | {error} | "
            f"{verdict} |"
        )
    return lines


def judge(builds: Sequence[ScaledBuild]) -> list[str]:
    """Return what is over a limit, a line each: growth from the smallest variant on, and ViT-L."""
    found = [f"{_name(b)}: {b.error}" for b in builds if b.error]
    for b in builds:
        first = next(o for o in builds if (o.side_px, o.precision) == (b.side_px, b.precision))
        more = WEIGHTS_GB[b.variant] - WEIGHTS_GB[first.variant]
        growth = (b.peak_gb - first.peak_gb) / more if more > 0 else 0.0
        if growth > MAX_GROWTH:
            found.append(
                f"{_name(b)}: peak memory grows by {growth:.1f} bytes for each byte of weights; "
                f"{MAX_GROWTH:g} are allowed"
            )
        seconds, gigabytes = LARGE_LIMIT
        if b.variant == "l" and (b.wall_s > seconds or b.peak_gb > gigabytes):
            found.append(
                f"{_name(b)}: {b.wall_s:.0f} s and {b.peak_gb:g} GB; {seconds:.0f} s and "
                f"{gigabytes:g} GB are allowed"
            )
    return found


def _name(build: ScaledBuild) -> str:
    return f"ViT-{build.variant.upper()} at {build.side_px}, {build.precision}"


if __name__ == "__main__":
    typer.run(run)
