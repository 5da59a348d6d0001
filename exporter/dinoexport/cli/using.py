"""Commands that use what was built: predict, inspect."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dinoexport.cli.app import Json, app
from dinoexport.cli.output import one_line, print_json, print_outputs


@app.command()
def predict(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that `build` wrote.")],
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT=FILE...",
            help="One per input of the task: primary=a.png up=b.png down=c.png for eyelid.",
        ),
    ] = None,
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

    result = predict_files(bundle, images or [], picture=picture, left_eye=eye, px_per_mm=px_per_mm)
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
    print_outputs(result)
    if result.notice:
        typer.echo(result.notice)
    if picture:
        typer.echo(f"drawn into {picture}")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A bundle or a checkpoint.")],
    passes: Annotated[
        bool,
        typer.Option("--passes", help="Of a checkpoint: operations before and after each pass."),
    ] = False,
    layout: Annotated[str, typer.Option(help="With --passes: tokens, ane or cpu.")] = "tokens",
    json: Json = False,
) -> None:
    """Say what a bundle or a checkpoint is: inputs, outputs, origin, metadata, operations."""
    from dinoexport.inspection import inspect_passes, inspect_path

    if passes:
        found = inspect_passes(path, layout)
        if json:
            print_json(found)
        else:
            _print_passes(found)
        return
    facts = inspect_path(path)
    if json:
        print_json(facts)
        return
    _print_facts(facts, 0)


def _print_passes(found: dict[str, Any]) -> None:
    """Print one line per pass, and the operations that are left."""
    width = max(len(step["name"]) for step in found["passes"])
    for step in found["passes"]:
        before, after = step["operations"]
        texts = [f"{name} {old} → {new}" for name, (old, new) in step["changed"].items()]
        if step["parameters"][0] != step["parameters"][1]:
            old, new = (f"{count:,}" for count in step["parameters"])
            texts.append(f"{old} → {new} parameters")
        typer.echo(f"{step['name']:{width}} {before:5} → {after:<5} {', '.join(texts) or 'same'}")
    left = ", ".join(f"{name} {count}" for name, count in found["operations"].items())
    typer.echo(f"{'left':{width}} {left}")


def _print_facts(facts: dict[str, Any], depth: int) -> None:
    """Print nested facts; they come from files, so each is kept on its line."""
    pad = "  " * depth
    for key, value in facts.items():
        if value in ("", [], (), {}, None):
            continue
        if isinstance(value, dict):
            typer.echo(f"{pad}{one_line(key)}:")
            _print_facts(value, depth + 1)
        elif isinstance(value, list | tuple) and isinstance(value[0], dict):
            typer.echo(f"{pad}{one_line(key)}:")
            for item in value:
                text = ", ".join(f"{k}={_plain(v)}" for k, v in item.items() if v != "")
                typer.echo(f"{pad}  - {text}")
        else:
            typer.echo(f"{pad}{one_line(key)}: {_plain(value)}")


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return one_line(str(value))
