"""The command that shows the main job once, on the embedded checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from dinoexport.cli.app import TaskName, app
from dinoexport.cli.building import print_verdict
from dinoexport.cli.output import FAILED


@app.command()
def demo(
    task: TaskName = "eyelid",
    target: Annotated[str, typer.Option(help="onnx, coreml or tflite.")] = "coreml",
    out: Annotated[Path, typer.Option(help="Folder for the bundle and the picture.")] = Path(
        "artifacts"
    ),
) -> None:
    """Build the embedded checkpoint, and measure a rendered sample with the artifact."""
    from dinoexport.console import Reporter
    from dinoexport.demo import run_demo

    result = run_demo(task, target, out, Reporter())
    print_verdict(str(result.bundle.path), result.bundle.verdict, result.bundle.size_bytes)
    typer.echo(f"{'output':13} {'measured':>9} {'true':>8}")
    for name, value in result.prediction.outputs.items():
        true = result.true.get(name)
        shown = f"{true:8.2f}" if true is not None else " " * 8
        typer.echo(f"{name:13} {value:9.2f} {shown} {result.prediction.units[name]}")
    typer.echo(f"picture       {result.picture}")
    if not result.bundle.verdict.passed:
        raise typer.Exit(FAILED)
