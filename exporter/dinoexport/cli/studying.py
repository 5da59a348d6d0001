"""The command that runs experiments: the eyelid paper's, and recipes of a task side by side."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinoexport.cli.app import ImageSize, Json, TaskName, app
from dinoexport.cli.output import check_folder, one_line, one_of, parse_size, print_json
from dinoexport.cli.training import Cache, Device, print_metrics, resolve_backbone
from dinotrain.errors import UsageError

if TYPE_CHECKING:
    from dinotrain.report.page import Table

RECIPES = "recipes"
SEEDS = 5


@app.command()
def study(
    name: Annotated[
        str,
        typer.Argument(
            metavar="STUDY",
            help="baseline, ensemble or focal, of eyelid; recipes, of another task: frozen against "
            "fine-tuned.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, results and the page.")],
    data: Annotated[
        Path | None,
        typer.Option(help="A manifest, or its folder; eyes are rendered if left out."),
    ] = None,
    task: TaskName = "eyelid",
    count: Annotated[int, typer.Option(min=1, help="How many eyes are rendered.")] = 400,
    backbone: Annotated[str, typer.Option(help="As `train` takes it.")] = "embedded",
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Runs per variant; 5, of recipes 1, if left out.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Of each run; the recipes' own if left out.")
    ] = None,
    image_size: ImageSize = None,
    device: Device = "auto",
    cache: Cache = None,
    drop_checkpoints: Annotated[
        bool,
        typer.Option(
            "--drop-checkpoints", help="Remove each checkpoint once its figures are written."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Run an experiment over several seeds; goes on if cut off."""
    from dinoexport.console import Reporter, quiet
    from dinotrain.study.plan import STUDIES, StudyRequest
    from dinotrain.study.runs import run_study
    from dinotrain.study.tables import closing_tables, warning

    one_of("study", name, (*STUDIES, RECIPES))
    check_folder(out)
    if name == RECIPES:
        if data is None:
            raise UsageError("study recipes reads your data. Name them with --data.")
        shared = {
            "task": task,
            "data": data,
            "backbone": resolve_backbone(backbone),
            "device": one_of("device", device, ("auto", "cpu", "cuda")),
            "cache": cache,
            "report": True,
        }
        shared |= {"epochs": epochs} if epochs else {}
        shared |= {"image_size": parse_size(image_size)} if image_size else {}
        _recipes(shared, out, seeds or 1, json)
        return
    chosen = STUDIES[name]
    if task != chosen.task:
        raise UsageError(f"study {name} is of task {chosen.task}. Use recipes for {task}.")
    request = StudyRequest(
        study=chosen,
        backbone=resolve_backbone(backbone),
        out=out,
        data=data,
        count=count,
        seeds=seeds or SEEDS,
        epochs=epochs,
        image_size=parse_size(image_size) or (224, 224),
        device=one_of("device", device, ("auto", "cpu", "cuda")),
        cache=cache,
        keep=not drop_checkpoints,
    )
    with Reporter().tracker() as track, quiet(Path(os.devnull)):
        result = run_study(request, track)
    if json:
        print_json(result.plain())
        return
    for table in closing_tables(result):
        _print_table(table)
    typer.echo(warning(result))
    typer.echo(result.notice)
    typer.echo(f"{result.page}")


def _recipes(shared: dict[str, Any], out: Path, seeds: int, json: bool) -> None:
    """Run and print a task's recipes side by side."""
    from dinoexport.console import Reporter, quiet
    from dinotrain.compare import compare_presets, over_seeds

    with Reporter().tracker() as track, quiet(Path(os.devnull)):
        found = compare_presets(shared, out, seeds, track)
    runs = [header for headers in found.values() for header in headers]
    split = "test" if all("test" in header.metrics for header in runs) else "val"
    if json:
        print_json({n: over_seeds(headers, split)[0] for n, headers in found.items()})
        return
    for name, headers in found.items():
        mean, deviation = over_seeds(headers, split)
        epochs = ", ".join(str(header.training["best_epoch"]) for header in headers)
        typer.echo(f"{name}: {headers[0].training['mode']}, best epoch {epochs}")
        print_metrics(f"{split}, mean of {seeds}" if deviation else split, mean)
        if deviation:
            print_metrics("standard deviation", deviation)
    typer.echo(runs[0].notice)


def _print_table(table: "Table") -> None:
    """Print a caption and aligned rows; an empty line follows."""
    rows = [[one_line(str(cell)) for cell in row] for row in (table.columns, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    typer.echo(table.caption)
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())
    typer.echo("")
