"""Commands on the training side: data, train, evaluate."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from dinoexport.cli.app import ImageSize, Json, Seed, TaskName, app
from dinoexport.cli.output import (
    check_file,
    check_folder,
    one_line,
    one_of,
    parse_size,
    print_json,
)
from dinotrain.errors import unknown_name

if TYPE_CHECKING:
    pass

data_app = typer.Typer(
    help="Data sets: synthetic ones, and checks of your own.", no_args_is_help=True
)
app.add_typer(data_app, name="data")

Cache = Annotated[
    Path | None, typer.Option(help="Folder of cached features; the platform's if left out.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
SkipUnreadable = Annotated[
    bool,
    typer.Option("--skip-unreadable", help="Leave out pictures that cannot be read, and say so."),
]


@data_app.command("synth")
def synth(
    out: Annotated[Path, typer.Option(help="Folder for the images and their labels.")],
    task: TaskName = "eyelid",
    count: Annotated[int, typer.Option(min=1, help="How many samples.")] = 100,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Render a labelled synthetic data set; the same bytes for the same seed."""
    from dinoexport.console import Reporter, quiet
    from dinotrain.tasks import get_task

    chosen = get_task(task)
    check_folder(out)
    with Reporter().tracker() as track, quiet(Path(os.devnull)):
        manifest = chosen.synthesise(
            count, seed, out, lambda done, total: track("render", done, total)
        )
    if json:
        print_json({"manifest": str(manifest), "count": count, "seed": seed})
        return
    typer.echo(f"{manifest}: {count} rendered, seed {seed}")


@data_app.command("digits")
def digits(
    out: Annotated[Path, typer.Option(help="Folder for the images, by split and class.")],
    json: Json = False,
) -> None:
    """Write scikit-learn's handwritten digits as a folder per class: 1,797 real pictures."""
    from dinoexport.console import Reporter, quiet
    from dinotrain.data.digits import write_digits

    check_folder(out)
    with Reporter().tracker() as track, quiet(Path(os.devnull)):
        folder = write_digits(out, lambda done, total: track("write", done, total))
    count = len(list(folder.glob("*/*/*.png")))
    if json:
        print_json({"data": str(folder), "count": count})
        return
    typer.echo(f"{folder}: {count} handwritten digits")


@data_app.command("check")
def check(
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="A manifest, or the folder that holds it.")
    ],
    task: TaskName = "eyelid",
    skip_unreadable: SkipUnreadable = False,
    json: Json = False,
) -> None:
    """Read a data set as `train` would, and say what is in it."""
    from dinoexport.cli.data_summary import print_summary
    from dinoexport.console import Reporter
    from dinotrain.data.judging import told_of_checks
    from dinotrain.tasks import get_task

    chosen = get_task(task)
    with Reporter().tracker() as track:
        dataset = chosen.read(
            data,
            image_size=(224, 224),
            skip_unreadable=skip_unreadable,
            progress=told_of_checks(track),
        )
    print_summary(data, chosen.summarise(dataset), json)


@app.command()
def probe(
    data: Annotated[Path, typer.Option(help="A folder per class.")],
    out: Annotated[Path, typer.Option(help="The checkpoint to write (.safetensors).")],
    backbone: Annotated[str, typer.Option(help="As `train` takes it.")] = "embedded",
    protocol: Annotated[
        str,
        typer.Option(help="broad: standardised features, quarters too; or published."),
    ] = "broad",
    iterations: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of each classifier; the protocol's if left out."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 128,
    image_size: ImageSize = None,
    seed: Seed = 0,
    device: Device = "auto",
    cache: Cache = None,
    skip_unreadable: SkipUnreadable = False,
    json: Json = False,
) -> None:
    """Sweep linear classifiers over learning rates and features; k-NN beside them."""
    from dinoexport.console import Reporter, quiet_beside
    from dinotrain.checkpoint import read_config
    from dinotrain.probe import Protocol
    from dinotrain.probe import probe as run_probe
    from dinotrain.train_config import TrainConfig

    check_file(out, ".safetensors")
    chosen = one_of("protocol", protocol, get_args(Protocol))
    config = TrainConfig(
        task="classify",
        data=data,
        backbone=resolve_backbone(backbone),
        out=out,
        image_size=parse_size(image_size) or (224, 224),
        batch_size=batch_size,
        seed=seed,
        device=one_of("device", device, ("auto", "cpu", "cuda")),
        cache=cache,
        skip_unreadable=skip_unreadable,
    )
    with Reporter().tracker() as track, quiet_beside(out):
        result = run_probe(config, iterations, track, chosen)
    trained = read_config(result.path)
    if json:
        print_json(
            {
                "path": str(result.path),
                "features": result.features,
                "rate": result.rate,
                "val_accuracy": result.linear,
                "knn_val_accuracy": result.knn,
                "iterations": result.iterations,
                "sweep_s": round(result.sweep_s, 1),
                "metrics": trained.metrics,
                "notice": trained.notice,
            }
        )
        return
    typer.echo(
        f"{result.path}: {result.features}, learning rate {result.rate:g}; "
        f"{result.iterations} iterations, {result.sweep_s:.0f} s"
    )
    print_metrics("validation accuracy by rate", result.linear)
    if result.knn:
        print_metrics("validation accuracy by k", {"k-NN": result.knn})
    for split, metrics in trained.metrics.items():
        print_metrics(split, metrics)
    if trained.notice:
        typer.echo(trained.notice)


@app.command()
def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A trained .safetensors.")
    ],
    data: Annotated[Path, typer.Option(help="Labelled data.")],
    split: Annotated[str, typer.Option(help="train, val, test or all.")] = "test",
    device: Device = "auto",
    cache: Cache = None,
    skip_unreadable: SkipUnreadable = False,
    json: Json = False,
) -> None:
    """Judge a checkpoint on labelled data, beside the mean predictor."""
    from dinoexport.console import Reporter, quiet
    from dinotrain.fit import evaluate as run_evaluate

    with Reporter().tracker() as track, quiet(Path(os.devnull)):
        result = run_evaluate(
            checkpoint,
            data,
            split=one_of("split", split, ("train", "val", "test", "all")),
            cache=cache,
            device=one_of("device", device, ("auto", "cpu", "cuda")),
            skip_unreadable=skip_unreadable,
            progress=track,
        )
    if json:
        print_json(result)
        return
    typer.echo(f"{checkpoint} on {result['samples']} samples of {result['subjects']} subjects")
    print_metrics(result["split"], result["targets"])


def print_metrics(title: str, targets: dict[str, Any]) -> None:
    """Print one column per output, one row per figure; those of a baseline stand below."""
    columns = {output: _figures(metrics) for output, metrics in targets.items()}
    rows = list(dict.fromkeys(label for figures in columns.values() for label in figures))
    # What a model must beat stands last, whichever output brought it in first.
    rows.sort(key=lambda label: ":" in label)
    width = max(map(len, ["", title, *rows]))
    typer.echo(f"{title:{width}}" + "".join(f"{output:>15}" for output in columns))
    for label in rows:
        cells = "".join(f"{figures.get(label, ''):>15}" for figures in columns.values())
        typer.echo(f"{label:{width}}{cells}")


def _figures(metrics: dict[str, Any]) -> dict[str, str]:
    """Flatten metrics to {label: text}; tables within them are for --json."""
    found = {}
    for key, value in metrics.items():
        if isinstance(value, dict):
            inner = _figures(value)
            found |= {f"{key.replace('_', ' ')}: {one_line(k)}": v for k, v in inner.items()}
        elif not isinstance(value, list):
            found[key] = _figure(value)
    return found


def _figure(value: Any) -> str:
    if value is None:
        return "–"
    return one_line(value) if isinstance(value, str) else f"{value:.4g}"


def resolve_backbone(name: str) -> str:
    """Return what `--backbone` names as training takes it, or UsageError with the nearest name."""
    from dinotrain.backbones.loading import NAMES

    known = [*NAMES, "embedded"]
    looks_like_path = Path(name).suffix or any(mark in name for mark in "/\\~")
    if name.partition("@")[0] not in known and not looks_like_path and not Path(name).exists():
        raise unknown_name("backbone", name, known)
    if name != "embedded":
        return name
    from dinoexport.embedded import embedded_backbone

    return str(embedded_backbone())
