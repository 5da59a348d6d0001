"""The runs of a study, one after another: each is trained, or read where it is finished."""

import time
from pathlib import Path
from typing import Any

import msgspec

from dinotrain.backbones import load_backbone
from dinotrain.checkpoint import CheckpointConfig, load_checkpoint, read_config
from dinotrain.data.dataset import Dataset
from dinotrain.errors import DataError
from dinotrain.features import FeatureStore, Progress, default_cache, silent, weights_digest
from dinotrain.fit import pick_device, train
from dinotrain.loop import predict
from dinotrain.study.ledger import Ledger, RunRecord
from dinotrain.study.page import write_page
from dinotrain.study.plan import RENDER_SEED, StudyRequest, Variant
from dinotrain.study.tables import StudyResult
from dinotrain.tasks import get_task
from dinotrain.train_config import TrainConfig
from dinotrain.training_state import state_path

PAGE = "report.html"


def run_study(request: StudyRequest, progress: Progress | None = None) -> StudyResult:
    """Run what is left of a study, and write its page.

    A study that was cut off goes on where it was, between runs and inside of one; a finished one
    is only drawn again. More seeds may be asked for later.

    Args:
        request: the study, its data and its folder.
        progress: told of the stages "render", "features" and "runs".

    Returns:
        The records of all runs that were asked for, with the place of the page.

    Raises:
        UsageError: the folder holds another study, or another process is at work in it.
        DataError: the data have no test samples.
        DinoError: as ``train``.
    """
    report = progress or silent
    ledger = Ledger(request.out)
    with ledger.hold():
        ledger.claim(_recipes(request))
        data = request.data or _render(request, report)
        dataset = _read(request, data, 0)
        ledger.claim({"data": dataset.fingerprint, "backbone": _backbone(request)})
        records = _run_all(request, data, dataset, ledger, report)
        result = StudyResult(request, records, dataset, request.out / PAGE)
        write_page(result)
    return result


def _recipes(request: StudyRequest) -> dict[str, Any]:
    """Return what makes a study what it is, before its data are read."""
    recipes = {}
    for variant in request.variants:
        recipe = request.config(variant, 0, Path()).recipe()
        recipes[" / ".join(variant)] = {k: v for k, v in recipe.items() if k not in ("seed",)}
    rendered = 0 if request.data else request.count
    return {"study": request.study.name, "eyes rendered": rendered, "recipes": recipes}


def _render(request: StudyRequest, report: Progress) -> Path:
    folder = request.out / "data"
    if (folder / "manifest.csv").is_file():
        return folder
    task = get_task(request.study.task)
    return task.synthesise(
        request.count, RENDER_SEED, folder, lambda done, total: report("render", done, total)
    ).parent


def _read(request: StudyRequest, data: Path, seed: int) -> Dataset:
    dataset = get_task(request.study.task).read(data, image_size=request.image_size, seed=seed)
    for split in ("val", "test"):
        if not dataset.split(split).samples:
            raise DataError(
                f"{data}: no sample is in the split '{split}', and a study is judged there. Label "
                "more samples."
            )
    return dataset


def _backbone(request: StudyRequest) -> str:
    model = load_backbone(request.backbone, request.image_size)
    return weights_digest(model, model.config)


def _run_all(
    request: StudyRequest, data: Path, dataset: Dataset, ledger: Ledger, report: Progress
) -> list[RunRecord]:
    # Seed by seed, so that a study that is cut off has seen every variant.
    wanted = [(variant, seed) for seed in range(request.seeds) for variant in request.variants]
    records = {
        (Variant(record.group, record.variant), record.seed): record for record in ledger.read()
    }
    for place, (variant, seed) in enumerate(wanted):
        title = f"{variant.group}, {variant.name}, seed {seed}"
        if (variant, seed) not in records:
            config = request.config(variant, seed, data)
            report("runs", place, len(wanted), title)
            seconds = None if config.out.is_file() else _train(config, report)
            if dataset.fingerprint != read_config(config.out).dataset_fingerprint:
                # The split is drawn with the seed where the data leave it blank.
                dataset = _read(request, data, seed)
            records[variant, seed] = _judge(config, variant, dataset, seconds)
            ledger.write(list(records.values()))
            if not request.keep:
                config.out.unlink()
        report("runs", place + 1, len(wanted), title)
    return [records[key] for key in wanted]


def _train(config: TrainConfig, report: Progress) -> float:
    """Train one run, or what is left of it; returns the seconds that it took."""

    def tell(stage: str, done: int, total: int, note: str = "") -> None:
        # Epochs of many runs would be many lines; features are computed once for all.
        if stage == "features":
            report(stage, done, total, note)

    start = time.perf_counter()
    resume = state_path(config.out).is_file()
    train(msgspec.structs.replace(config, resume=resume), tell)
    return time.perf_counter() - start


def _judge(
    config: TrainConfig, variant: Variant, dataset: Dataset, seconds: float | None
) -> RunRecord:
    model, header = load_checkpoint(config.out)
    model.to(pick_device(config.device))
    part = dataset.split("test")
    store = FeatureStore(model, config.cache or default_cache())
    store.prepare(part)
    predicted = predict(model, store, part.samples)
    metrics: dict[str, Any] = header.metrics["test"]
    return RunRecord(
        group=variant.group,
        variant=variant.name,
        seed=config.seed,
        metrics=metrics,
        names=[sample.name for sample in part.samples],
        predicted={name: predicted[name].reshape(-1).tolist() for name in metrics},
        seconds=seconds,
        **_story(header),
    )


def _story(header: CheckpointConfig) -> dict[str, Any]:
    story = header.training
    return {
        "best_epoch": story["best_epoch"],
        "epochs": len(story["log"]["epoch"]),
        "stopped": story["stopped"],
        "fingerprint": header.dataset_fingerprint,
        "backbone": header.backbone.name,
        "trained_on": header.trained_on,
        "notice": header.notice,
        "versions": header.versions,
    }
