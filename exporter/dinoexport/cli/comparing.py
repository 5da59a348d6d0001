"""The command that sets a task's recipes side by side."""

from pathlib import Path
from typing import Annotated

import typer

from dinoexport.cli.app import ImageSize, Json, Seed, app
from dinoexport.cli.output import check_folder, one_of, parse_size, print_json
from dinoexport.cli.training import Cache, Device, print_metrics, resolve_backbone


@app.command()
def compare(
    data: Annotated[Path, typer.Option(help="What the task reads.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoints.")],
    task: Annotated[str, typer.Option(help="classify or segment.")] = "classify",
    backbone: Annotated[str, typer.Option(help="As `train` takes it.")] = "embedded",
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of the recipes' own.")] = None,
    image_size: ImageSize = None,
    seed: Seed = 0,
    device: Device = "auto",
    cache: Cache = None,
    json: Json = False,
) -> None:
    """Train a task's recipes on the same data: frozen against fine-tuned. Goes on if cut off."""
    from dinoexport.console import Reporter, quiet_beside
    from dinotrain.compare import compare_presets

    check_folder(out)
    shared = {
        "task": task,
        "data": data,
        "backbone": resolve_backbone(backbone),
        "seed": seed,
        "device": one_of("device", device, ("auto", "cpu", "cuda")),
        "cache": cache,
        "report": True,
    }
    shared |= {"epochs": epochs} if epochs else {}
    shared |= {"image_size": parse_size(image_size)} if image_size else {}
    with Reporter().tracker() as track, quiet_beside(out / "compare"):
        found = compare_presets(shared, out, track)
    if json:
        print_json({name: header.metrics for name, header in found.items()})
        return
    split = "test" if all("test" in header.metrics for header in found.values()) else "val"
    for name, header in found.items():
        typer.echo(f"{name}: {header.training['mode']}, best epoch {header.training['best_epoch']}")
        print_metrics(split, header.metrics.get(split, {}))
