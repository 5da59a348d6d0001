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
from dinotrain.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from dinotrain.heads.pool import FeatureConfig

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
    from dinotrain.tasks import get_task

    chosen = get_task(task)
    with Reporter().tracker() as track:
        dataset = chosen.read(
            data,
            image_size=(224, 224),
            skip_unreadable=skip_unreadable,
            progress=lambda done, total: track("check", done, total),
        )
    print_summary(data, chosen.summarise(dataset), json)


@app.command()
def train(
    data: Annotated[
        Path, typer.Option(help="What the task reads: eyes.csv, or a folder per class.")
    ],
    out: Annotated[Path, typer.Option(help="The checkpoint to write (.safetensors).")],
    task: TaskName = "eyelid",
    backbone: Annotated[
        str,
        typer.Option(
            help="dinov2_vits14, …, a weights file, a Hugging Face folder, a checkpoint, or "
            "'embedded'."
        ),
    ] = "embedded",
    head: Annotated[
        str,
        typer.Option(
            help="linear, probe, mlp, ensemble or query; multiscale for masks. The task's if left "
            "out."
        ),
    ] = "",
    members: Annotated[int, typer.Option(min=2, max=100, help="Members of an ensemble.")] = 5,
    hidden: Annotated[int, typer.Option(min=1, max=65536, help="Hidden width of the head.")] = 256,
    features: Annotated[
        str,
        typer.Option(
            help="cls, cls_mean, cls_quarters, cls4, … of a ViT, pooled of a CNN; pyramid, sfp, "
            "tokens or maps. What suits head and backbone if left out."
        ),
    ] = "",
    taps: Annotated[
        str, typer.Option(help="Blocks of a ViT that are read, 2,5,8,11; strides of a CNN.")
    ] = "",
    tap_norm: Annotated[
        str, typer.Option(help="none, final or own_ln; what suits the head if left out.")
    ] = "",
    encoding: Annotated[
        str, typer.Option(help="plain, gray, thermometer, johnson, scalar or gaussian.")
    ] = "gray",
    bits: Annotated[int, typer.Option(help="Bits per target, 1 to 24.")] = 8,
    decoding: Annotated[str, typer.Option(help="soft or hard.")] = "soft",
    loss: Annotated[
        str,
        typer.Option(
            help="bce, focal; mse, focal_r for scalar; nll for gaussian; cross_entropy for "
            "classes; the task's if left out."
        ),
    ] = "",
    gamma: Annotated[float, typer.Option(help="Of the focal losses.")] = 2.0,
    orthogonality: Annotated[
        str, typer.Option(help="task, so, grad (reported only) or none.")
    ] = "task",
    or_lambda: Annotated[float, typer.Option(help="Weight of the orthogonality.")] = 0.1,
    coverage: Annotated[
        float, typer.Option(help="How often intervals hold for a new subject; 0 makes none.")
    ] = 0.9,
    optimizer: Annotated[str, typer.Option(help="adam, adamw or sgd.")] = "adam",
    lr: Annotated[float, typer.Option(help="Learning rate of the head.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="For adamw.")] = 0.0,
    schedule: Annotated[str, typer.Option(help="cosine, constant or step.")] = "cosine",
    batch_size: Annotated[int, typer.Option(help="Samples per step.")] = 32,
    epochs: Annotated[int, typer.Option(help="At most this many.")] = 60,
    patience: Annotated[int, typer.Option(help="Epochs without a better validation error.")] = 15,
    image_size: ImageSize = None,
    seed: Seed = 0,
    weights: Annotated[
        str, typer.Option(help="How weights are stored: float32 or float16.")
    ] = "float32",
    device: Device = "auto",
    cache: Cache = None,
    name: Annotated[str, typer.Option(help="Name that the checkpoint carries.")] = "",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a run was cut off.")
    ] = False,
    json: Json = False,
) -> None:
    """Train a head on frozen features."""
    from dinotrain.encoding import Encoding, EncodingKind
    from dinotrain.fit import train as run_train
    from dinotrain.heads.branch import HeadConfig, HeadKind
    from dinotrain.train_config import LossName, TrainConfig

    check_file(out, ".safetensors")
    source = _resolve_backbone(backbone)
    encoding = one_of("encoding", encoding, get_args(EncodingKind))
    config = TrainConfig(
        task=task,
        data=data,
        backbone=source,
        out=out,
        name=name,
        image_size=parse_size(image_size) or (224, 224),
        features=_parse_features(features, taps, tap_norm),
        head=HeadConfig(
            kind=one_of("head", head, get_args(HeadKind)), members=members, hidden=hidden
        )
        if head
        else None,
        encoding=Encoding(
            kind=encoding,  # type: ignore[arg-type]
            bits=bits,
            decoding=one_of("decoding", decoding, ("soft", "hard")),
        ),
        loss=one_of("loss", loss, get_args(LossName)) if loss else "",
        gamma=gamma,
        orthogonality=one_of("orthogonality", orthogonality, ("task", "so", "grad", "none")),
        or_lambda=or_lambda,
        coverage=coverage,
        optimizer=one_of("optimizer", optimizer, ("adam", "adamw", "sgd")),
        lr=lr,
        weight_decay=weight_decay,
        schedule=one_of("schedule", schedule, ("cosine", "constant", "step")),
        batch_size=batch_size,
        epochs=epochs,
        patience=patience,
        seed=seed,
        weights=one_of("weights", weights, ("float32", "float16")),
        device=one_of("device", device, ("auto", "cpu", "cuda")),
        cache=cache,
        resume=resume,
    )
    from dinoexport.console import Reporter, quiet_beside
    from dinotrain.checkpoint import read_config

    with Reporter().tracker() as track, quiet_beside(out):
        path = run_train(config, track)
    trained = read_config(path)
    if json:
        print_json({"path": str(path), "metrics": trained.metrics, "notice": trained.notice})
        return
    typer.echo(f"{path}")
    for split, metrics in trained.metrics.items():
        if isinstance(metrics, dict):
            _print_metrics(split, metrics.get("targets", metrics))
    typer.echo(trained.notice)


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
        backbone=_resolve_backbone(backbone),
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
    _print_metrics("validation accuracy by rate", result.linear)
    if result.knn:
        _print_metrics("validation accuracy by k", {"k-NN": result.knn})
    for split, metrics in trained.metrics.items():
        _print_metrics(split, metrics)
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
    _print_metrics(result["split"], result["targets"])


def _print_metrics(title: str, targets: dict[str, Any]) -> None:
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


def _resolve_backbone(name: str) -> str:
    from dinotrain.backbones.loading import NAMES

    known = [*NAMES, "embedded"]
    looks_like_path = Path(name).suffix or any(mark in name for mark in "/\\~")
    if name.partition("@")[0] not in known and not looks_like_path and not Path(name).exists():
        raise unknown_name("backbone", name, known)
    if name != "embedded":
        return name
    from dinoexport.embedded import embedded_backbone

    return str(embedded_backbone())


def _parse_features(kind: str, taps: str, tap_norm: str) -> "FeatureConfig | None":
    from dinotrain.backbones.vit import TapNorm
    from dinotrain.heads.pool import FeatureConfig, FeatureKind

    norm = one_of("tap norm", tap_norm, get_args(TapNorm)) if tap_norm else "final"
    blocks = _parse_taps(taps)
    if kind:
        wanted = one_of("features", kind, get_args(FeatureKind))
        return FeatureConfig(kind=wanted, taps=blocks, tap_norm=norm)
    if taps or tap_norm:
        raise UsageError("--taps and --tap-norm belong to --features. Name them, such as pyramid.")
    return None


def _parse_taps(text: str) -> tuple[int, ...]:
    if not text:
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--taps '{text}' is no list of blocks; accepted: 2,5,8,11") from error
