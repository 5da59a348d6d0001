"""The command ``train``: every choice of a training run as an option."""

from pathlib import Path
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import typer

from dinoexport.cli.app import ImageSize, Json, Seed, TaskName, app
from dinoexport.cli.output import check_file, one_of, parse_size, print_json
from dinoexport.cli.training import Cache, Device, SkipUnreadable, print_metrics, resolve_backbone
from dinotrain.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from dinotrain.heads.pool import FeatureConfig
    from dinotrain.train_config import TrainConfig

MODEL, LOSS, STEPS, PLACES = "Model", "Loss", "Optimisation", "Machine and files"


def _option(panel: str, text: str, **more: Any) -> Any:
    return typer.Option(help=text, rich_help_panel=panel, **more)


@app.command()
def train(
    context: typer.Context,
    data: Annotated[
        Path, typer.Option(help="What the task reads: eyes.csv, or a folder of classes or masks.")
    ],
    out: Annotated[Path, typer.Option(help="The checkpoint to write (.safetensors).")],
    task: TaskName = "eyelid",
    preset: Annotated[
        str, typer.Option(help="A recipe of the task's, such as brief or frozen of segment.")
    ] = "",
    backbone: Annotated[
        str,
        _option(
            MODEL,
            "dinov2_vits14, seresnet50, …, a weights file, a Hugging Face folder, a checkpoint, "
            "or 'embedded'; see `dinoexport list`.",
        ),
    ] = "embedded",
    mode: Annotated[str, _option(MODEL, "frozen; finetune trains the backbone too.")] = "frozen",
    head: Annotated[
        str,
        _option(
            MODEL,
            "linear, probe, mlp, ensemble or query; multiscale for masks. The task's if left out.",
        ),
    ] = "",
    members: Annotated[int, _option(MODEL, "Members of an ensemble.", min=2, max=100)] = 5,
    hidden: Annotated[int, _option(MODEL, "Hidden width of the head.", min=1, max=65536)] = 256,
    features: Annotated[
        str,
        _option(
            MODEL,
            "cls, cls_mean, cls_quarters, cls4, … of a ViT, pooled of a CNN; pyramid, sfp, tokens "
            "or maps. What suits head and backbone if left out.",
        ),
    ] = "",
    taps: Annotated[
        str, _option(MODEL, "Blocks of a ViT that are read, 2,5,8,11; strides of a CNN.")
    ] = "",
    tap_norm: Annotated[
        str, _option(MODEL, "none, final or own_ln; what suits the head if left out.")
    ] = "",
    image_size: ImageSize = None,
    encoding: Annotated[
        str, _option(LOSS, "plain, gray, thermometer, johnson, scalar or gaussian.")
    ] = "gray",
    bits: Annotated[int, _option(LOSS, "Bits per target, 1 to 24.")] = 8,
    decoding: Annotated[str, _option(LOSS, "soft or hard.")] = "soft",
    loss: Annotated[
        str,
        _option(
            LOSS,
            "bce, focal; mse, focal_r for scalar; nll for gaussian; cross_entropy for classes; "
            "dice_focal for masks; the task's if left out.",
        ),
    ] = "",
    gamma: Annotated[float, _option(LOSS, "Of the focal losses.")] = 2.0,
    orthogonality: Annotated[
        str, _option(LOSS, "task, so, grad (reported only) or none.")
    ] = "task",
    or_lambda: Annotated[float, _option(LOSS, "Weight of the orthogonality.")] = 0.1,
    coverage: Annotated[
        float, _option(LOSS, "How often intervals hold for a new subject; 0 makes none.")
    ] = 0.9,
    optimizer: Annotated[str, _option(STEPS, "adam, adamw or sgd.")] = "adam",
    lr: Annotated[float, _option(STEPS, "Learning rate of the head.")] = 1e-3,
    backbone_lr: Annotated[
        float, _option(STEPS, "Learning rate behind the backbone's last block, where it trains.")
    ] = 1e-5,
    layer_decay: Annotated[
        float, _option(STEPS, "Factor on the backbone's rate, block by block to the input.")
    ] = 0.9,
    live_statistics: Annotated[
        bool, _option(STEPS, "Let BatchNorm follow the batches when the backbone trains.")
    ] = False,
    weight_decay: Annotated[float, _option(STEPS, "0 is none.")] = 0.0,
    schedule: Annotated[str, _option(STEPS, "cosine, constant, step or sgdr.")] = "cosine",
    min_lr: Annotated[float, _option(STEPS, "Where the cosines end.")] = 0.0,
    restart_epochs: Annotated[
        int, _option(STEPS, "First period of sgdr; a third of the epochs if 0.")
    ] = 0,
    restart_mult: Annotated[int, _option(STEPS, "How much longer each period is.")] = 2,
    warmup_epochs: Annotated[int, _option(STEPS, "Epochs in which rates rise from 0.")] = 0,
    batch_size: Annotated[int, _option(STEPS, "Samples per batch.")] = 32,
    accumulate: Annotated[int, _option(STEPS, "Batches per step.")] = 1,
    clip_norm: Annotated[float, _option(STEPS, "Largest norm of the gradient; 0: none.")] = 0.0,
    epochs: Annotated[int, _option(STEPS, "At most this many.")] = 60,
    patience: Annotated[int, _option(STEPS, "Epochs without a better validation error.")] = 15,
    min_delta: Annotated[float, _option(STEPS, "By how much it must fall to be better.")] = 0.0,
    augment: Annotated[
        bool, _option(STEPS, "Change training pictures at random, as the task allows.")
    ] = False,
    augment_copies: Annotated[
        int, _option(STEPS, "Changes of each picture, where features are frozen.")
    ] = 4,
    seed: Seed = 0,
    device: Device = "auto",
    devices: Annotated[int, _option(PLACES, "Processes that share each batch.", min=1)] = 1,
    strategy: Annotated[str, _option(PLACES, "auto, ddp or fsdp (GPUs).")] = "auto",
    amp: Annotated[str, _option(PLACES, "Mixed precision: off, bfloat16 or float16.")] = "off",
    weights: Annotated[
        str, _option(PLACES, "How weights are stored: float32 or float16.")
    ] = "float32",
    cache: Cache = None,
    cache_precision: Annotated[
        str, _option(PLACES, "How cached features are stored: float32 or float16.")
    ] = "float32",
    name: Annotated[str, _option(PLACES, "Name that the checkpoint carries.")] = "",
    report: Annotated[
        bool, _option(PLACES, "Write a page about the model beside it (.html).")
    ] = True,
    events: Annotated[Path | None, _option(PLACES, "Folder of logs for TensorBoard.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a run was cut off.")
    ] = False,
    skip_unreadable: SkipUnreadable = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be trained, and stop.")
    ] = False,
    json: Json = False,
) -> None:
    """Train a head on frozen features, or with its backbone."""
    check_file(out, ".safetensors")
    config = _config(context.params, _given(context))
    if dry_run:
        from dinoexport.cli.run_plan import print_plan

        print_plan(config, json)
        return
    from dinoexport.console import Reporter, quiet_beside
    from dinotrain.checkpoint import read_config
    from dinotrain.fit import train as run_train
    from dinotrain.report.training import report_path

    with Reporter().tracker() as track, quiet_beside(out):
        path = run_train(config, track)
    trained = read_config(path)
    page = str(report_path(path)) if report else None
    if json:
        facts = {"path": str(path), "report": page, "metrics": trained.metrics}
        print_json({**facts, "notice": trained.notice})
        return
    typer.echo(f"{path}")
    if page:
        typer.echo(page)
    for split, metrics in trained.metrics.items():
        print_metrics(split, metrics)
    if trained.notice:
        typer.echo(trained.notice)


def _given(context: typer.Context) -> set[str]:
    """Names of the options that stand on the command line."""
    return {
        name
        for name in context.params
        if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
    }


def _config(options: dict[str, Any], given: set[str]) -> "TrainConfig":
    """Return the recipe: options that are given, over the preset, over the defaults."""
    from dinotrain.encoding import Encoding, EncodingKind
    from dinotrain.heads.branch import HeadConfig, HeadKind
    from dinotrain.tasks import get_task
    from dinotrain.train_config import TrainConfig

    fields = {}
    for field, hint in get_type_hints(TrainConfig).items():
        if field in options:
            fields[field] = _checked(field, options[field], hint)
    head = options["head"]
    fields |= {
        "backbone": resolve_backbone(options["backbone"]),
        "image_size": parse_size(options["image_size"]) or (224, 224),
        "features": _features(options["features"], options["taps"], options["tap_norm"]),
        "head": HeadConfig(
            kind=one_of("head", head, get_args(HeadKind)),
            members=options["members"],
            hidden=options["hidden"],
        )
        if head
        else None,
        "encoding": Encoding(
            kind=one_of("encoding", options["encoding"], get_args(EncodingKind)),
            bits=options["bits"],
            decoding=one_of("decoding", options["decoding"], ("soft", "hard")),
        ),
    }
    if options["preset"]:
        presets = get_task(options["task"]).presets
        if options["preset"] not in presets:
            raise unknown_name(f"preset of task {options['task']}", options["preset"], presets)
        preset = presets[options["preset"]]
        fields |= {field: value for field, value in preset.items() if field not in given}
    return TrainConfig(**fields)


def _checked(field: str, value: Any, hint: Any) -> Any:
    """Return an option's value, or UsageError with the nearest of the words that are accepted."""
    words = _words(hint)
    if not words or not isinstance(value, str) or value in words:
        return value
    return one_of(field.replace("_", " "), value, [word for word in words if word])


def _words(hint: Any) -> tuple[str, ...]:
    """Words that a type accepts, where it is one of words."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return tuple(word for part in get_args(hint) for word in _words(part))
    return ()


def _features(kind: str, taps: str, tap_norm: str) -> "FeatureConfig | None":
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
