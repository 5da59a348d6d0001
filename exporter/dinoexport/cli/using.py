"""Commands that use what was built: predict, inspect."""

from pathlib import Path
from typing import Annotated

import typer

from dinoexport.cli.app import Json, app
from dinoexport.cli.output import print_json


@app.command()
def predict(
    bundle: Annotated[Path, typer.Argument(help="A folder that `build` wrote.")],
    images: Annotated[list[str], typer.Argument(help="NAME=FILE per input of the task.")],
    picture: Annotated[
        Path | None, typer.Option(help="Draw the measurement on the pictures, into this PNG.")
    ] = None,
    eye: Annotated[
        str, typer.Option(help="R, or L for a left eye, which is mirrored first.")
    ] = "R",
    px_per_mm: Annotated[
        float | None,
        typer.Option(help="Scale of the pictures: cuts the task's millimetre window."),
    ] = None,
    json: Json = False,
) -> None:
    """Run an artifact on picture files."""
    from dinoexport.predict import predict_files

    result = predict_files(bundle, images, picture=picture, left_eye=eye, px_per_mm=px_per_mm)
    if json:
        print_json(
            {
                "outputs": result.outputs,
                "units": result.units,
                "runtime": result.runtime,
                "notice": result.notice,
            }
            | ({"picture": str(picture)} if picture else {})
        )
        return
    for name, value in result.outputs.items():
        typer.echo(f"{name:13} {value:8.3f} {result.units[name]}")
    if result.notice:
        typer.echo(result.notice)
    if picture:
        typer.echo(f"drawn into {picture}")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A bundle or a checkpoint.")],
    json: Json = False,
) -> None:
    """Say what a bundle or a checkpoint is: inputs, outputs, origin, metadata, operations."""
    from dinoexport.inspection import inspect_path

    facts = inspect_path(path)
    if json:
        print_json(facts)
        return
    _print_facts(facts, 0)


def _print_facts(facts: object, depth: int) -> None:
    pad = "  " * depth
    if isinstance(facts, dict):
        for key, value in facts.items():
            if isinstance(value, dict | list) and value:
                typer.echo(f"{pad}{key}:")
                _print_facts(value, depth + 1)
            elif value not in ("", [], {}, None):
                typer.echo(f"{pad}{key}: {value}")
        return
    for item in facts if isinstance(facts, list) else [facts]:
        if isinstance(item, dict):
            typer.echo(f"{pad}- " + ", ".join(f"{k}={v}" for k, v in item.items() if v != ""))
        else:
            typer.echo(f"{pad}- {item}")
