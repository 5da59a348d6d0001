"""The command that runs the eyelid paper's experiments."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dinoexport.cli.app import ImageSize, Json, app
from dinoexport.cli.output import check_folder, one_line, one_of, parse_size, print_json
from dinoexport.cli.training import Cache, Device, resolve_backbone

if TYPE_CHECKING:
    from dinotrain.report.page import Table


@app.command()
def study(
    name: Annotated[str, typer.Argument(metavar="STUDY", help="baseline, ensemble or focal.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, results and the page.")],
    data: Annotated[
        Path | None,
        typer.Option(help="A manifest, or its folder; eyes are rendered if left out."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many eyes are rendered.")] = 400,
    backbone: Annotated[str, typer.Option(help="As `train` takes it.")] = "embedded",
    seeds: Annotated[int, typer.Option(min=1, help="Runs per variant.")] = 5,
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
    """Run one of the eyelid paper's experiments over several seeds; goes on if cut off."""
    from dinoexport.console import Reporter, quiet
    from dinotrain.study.plan import STUDIES, StudyRequest
    from dinotrain.study.runs import run_study
    from dinotrain.study.tables import closing_tables, warning

    chosen = STUDIES[one_of("study", name, tuple(STUDIES))]
    check_folder(out)
    request = StudyRequest(
        study=chosen,
        backbone=resolve_backbone(backbone),
        out=out,
        data=data,
        count=count,
        seeds=seeds,
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


def _print_table(table: "Table") -> None:
    """Print a caption and aligned rows; an empty line follows."""
    rows = [[one_line(str(cell)) for cell in row] for row in (table.columns, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    typer.echo(table.caption)
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())
    typer.echo("")
