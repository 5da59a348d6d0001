"""The command that shows the main job once, on the embedded checkpoint."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dinoexport.cli.app import Json, TaskName, app
from dinoexport.cli.building import bundle_json, print_verdict
from dinoexport.cli.output import FAILED, check_folder, one_of, print_json, print_outputs


@app.command()
def demo(
    task: TaskName = "eyelid",
    target: Annotated[str, typer.Option(help="onnx, coreml or tflite.")] = "coreml",
    out: Annotated[Path, typer.Option(help="Folder for the bundle and the picture.")] = Path(
        "artifacts"
    ),
    json: Json = False,
) -> None:
    """Build the embedded checkpoint, and measure a rendered sample with the artifact."""
    from dinoexport.console import Reporter
    from dinoexport.demo import run_demo
    from dinoexport.targets.table import TABLE

    check_folder(out)
    result = run_demo(task, one_of("target", target, tuple(TABLE)), out, Reporter())
    if json:
        print_json(
            {
                "passed": result.bundle.verdict.passed,
                "bundle": bundle_json(result.bundle),
                "outputs": result.prediction.outputs,
                "true": result.true,
                "picture": str(result.picture),
            }
        )
    else:
        _print_result(result)
    if not result.bundle.verdict.passed:
        raise typer.Exit(FAILED)


def _print_result(result: Any) -> None:
    print_verdict(str(result.bundle.path), result.bundle.verdict, result.bundle.size_bytes)
    print_outputs(result.prediction, result.true)
    typer.echo(f"picture       {result.picture}")
