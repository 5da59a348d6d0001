"""What the feature cache saves: ``python -m dinobench.feature_cache`` trains one head both ways.

An epoch of a head on ViT-S/14 with random weights at 224 pixels, once with the frozen backbone run
on every picture, once from cached features. Epochs of both kinds take turns in one process, so that
whatever else the machine does slows both. Exit status: 0 the limit holds, 1 it does not.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from dinobench.machine import Machine, busy_note, describe_machine

if TYPE_CHECKING:
    import torch

    from dinotrain.data.dataset import Sample
    from dinotrain.loop import Trainee
    from dinotrain.objectives.base import Objective
    from dinotrain.sources import Source

LEAST_RATIO = 20
LEAST_PICTURES = 64
BATCH = 32
TURNS = 5
"""Epochs from the cache for each one with the backbone."""


class CacheReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one run of ``dinobench.feature_cache`` found; times are medians."""

    schema: str = "dinobench.feature_cache"
    schema_version: int = 1
    machine: Machine
    note: str
    features: str
    pictures: int
    repeats: int
    backbone_epoch_s: float
    """Pictures read, and the backbone run on them."""
    memory_epoch_s: float
    """Features held in memory, as training does up to 2 GiB."""
    disk_epoch_s: float
    """Features read from their files in each epoch."""
    ratio: float
    """The backbone's epoch over the slower of the other two."""
    limit: float = LEAST_RATIO
    passed: bool


def run(
    pictures: Annotated[int, typer.Option(min=LEAST_PICTURES, help="How many.")] = LEAST_PICTURES,
    features: Annotated[str, typer.Option(help="As `train` takes them, one vector.")] = "cls_mean",
    repeats: Annotated[int, typer.Option(min=1, help="Epochs with the backbone.")] = 3,
    threads: Annotated[int, typer.Option(min=0, help="Of torch; 0 is its own choice.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print seconds per epoch with the backbone, from cached features, and their ratio."""
    note = busy_note()
    with tempfile.TemporaryDirectory(prefix="dinobench-") as folder:
        times = measure(Path(folder), pictures, features, repeats, threads)
    backbone_s, memory_s, disk_s = (median(values) for values in times)
    ratio = backbone_s / max(memory_s, disk_s)
    report = CacheReport(
        machine=describe_machine(),
        note=note,
        features=features,
        pictures=pictures,
        repeats=repeats,
        backbone_epoch_s=round(backbone_s, 3),
        memory_epoch_s=round(memory_s, 5),
        disk_epoch_s=round(disk_s, 5),
        ratio=round(ratio, 1),
        passed=ratio >= LEAST_RATIO,
    )
    if json:
        typer.echo(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    else:
        typer.echo(
            f"ViT-S/14 at 224, {pictures} pictures, linear head on {features}, seconds per epoch: "
            f"{backbone_s:.2f} with the backbone, {memory_s:.4f} from features in memory, "
            f"{disk_s:.4f} from their files: {ratio:.0f} times as fast, {LEAST_RATIO} wanted"
            + (f" ({note})" if note else "")
        )
    raise typer.Exit(0 if report.passed else 1)


def measure(
    folder: Path, pictures: int, features: str, repeats: int, threads: int
) -> tuple[list[float], list[float], list[float]]:
    """Time epochs of one head.

    Args:
        folder: for pictures and features.
        pictures: how many are rendered.
        features: kind that the head reads.
        repeats: epochs with the backbone; of the others ``TURNS`` times as many.
        threads: of torch; 0 leaves them.

    Returns:
        Seconds of each epoch: with the backbone, from memory, from files.
    """
    import torch

    from dinotrain import features as feature_store
    from dinotrain.backbones.vit import VARIANTS, VisionTransformer, init_weights_
    from dinotrain.features import FeatureStore
    from dinotrain.fit import build_model, decide
    from dinotrain.heads.branch import HeadConfig
    from dinotrain.heads.pool import FeatureConfig
    from dinotrain.loop import Trainee, build_optimizer
    from dinotrain.sources import Pictures
    from dinotrain.tasks import get_task
    from dinotrain.train_config import TrainConfig

    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    task = get_task("classify")
    data = task.synthesise(pictures, 0, folder / "data")
    dataset = task.read(data, image_size=(224, 224))
    backbone = init_weights_(VisionTransformer(VARIANTS["dinov2_vits14"]))
    config = TrainConfig(
        task="classify",
        data=data,
        backbone="dinov2_vits14",
        out=folder / "head.safetensors",
        head=HeadConfig(kind="linear"),
        features=FeatureConfig(kind=features),  # type: ignore[arg-type]
    )
    config = decide(config, backbone)
    model = build_model(config, backbone, dataset.classes)
    optimizer, objective = build_optimizer(config, model), task.objective(config, model)
    memory = FeatureStore(model, folder / "cache")
    memory.prepare(dataset)
    files = FeatureStore(model, folder / "cache")
    live, cached = Trainee(model, live=True), Trainee(model, live=False)
    plan: tuple[tuple[Trainee, Source, int], ...] = (
        (live, Pictures(task, (224, 224)), 1),
        (cached, memory, TURNS),
        (cached, files, TURNS),
    )
    times: tuple[list[float], list[float], list[float]] = ([], [], [])
    allowed, feature_store.MEMORY_BYTES = feature_store.MEMORY_BYTES, 0
    try:
        # The first round allocates; it does not count.
        for round_ in range(repeats + 1):
            for (trainee, source, turns), taken in zip(plan, times, strict=True):
                for _ in range(turns):
                    start = time.perf_counter()
                    _epoch(trainee, source, dataset.samples, objective, optimizer)
                    if round_:
                        taken.append(time.perf_counter() - start)
    finally:
        feature_store.MEMORY_BYTES = allowed
    return times


def _epoch(
    trainee: "Trainee",
    source: "Source",
    samples: "Sequence[Sample]",
    objective: "Objective",
    optimizer: "torch.optim.Optimizer",
) -> None:
    """Train the head once over all samples, as ``loop`` does."""
    for start in range(0, len(samples), BATCH):
        batch = source.batch(samples[start : start + BATCH])
        loss = objective.loss(trainee(batch.inputs, batch.present), batch.truth)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    typer.run(run)
