"""Every task on every family of backbones with every kind of head goes the whole way: trained,
evaluated, built for every target with a passing verdict, verified anew, and predicting the same.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinoexport.console import Reporter
from dinoexport.pipeline import build
from dinoexport.plan import BuildRequest
from dinoexport.predict import predict_files
from dinoexport.recipes import parse_recipe
from dinoexport.reverify import verify_bundle
from dinoexport.verify.parity import budget_of
from dinotrain.backbones.convnets.backbone import init_weights_ as init_convnet_
from dinotrain.backbones.convnets.config import ConvNetConfig
from dinotrain.backbones.convnets.table import build_convnet
from dinotrain.backbones.convnets.weights import save_convnet
from dinotrain.backbones.vit import VisionTransformer, ViTConfig, init_weights_
from dinotrain.backbones.weights import save_backbone
from dinotrain.checkpoint import load_checkpoint
from dinotrain.encoding import Encoding
from dinotrain.fit import evaluate, train
from dinotrain.heads.branch import HeadConfig
from dinotrain.heads.pool import FeatureConfig
from dinotrain.heads.query import QueryConfig
from dinotrain.heads.segmentation import DecoderConfig
from dinotrain.tasks import TABLE as TASKS
from dinotrain.tasks import get_task
from dinotrain.train_config import TrainConfig

pytestmark = pytest.mark.e2e

SIZES = {"eyelid": (56, 70), "classify": (56, 70), "segment": (84, 98)}
"""Not square. Of segment larger: a group norm over few places leaves float32 few digits."""
COUNTS = {"eyelid": 14, "classify": 30, "segment": 12}
HEADS: dict[str, HeadConfig] = {
    "linear": HeadConfig(kind="linear"),
    "mlp": HeadConfig(hidden=16),
    "ensemble": HeadConfig(kind="ensemble", members=2, hidden=16),
    "query": HeadConfig(kind="query", query=QueryConfig(dim=16, layers=2, heads=2, hidden=32)),
    "multiscale": HeadConfig(
        kind="multiscale", decoder=DecoderConfig(channels=(16, 16, 8, 8), dropout=0.0)
    ),
}
GAUSSIAN, JOHNSON = Encoding(kind="gaussian"), Encoding(kind="johnson", bits=4)
MATRIX: dict[str, dict[str, Any]] = {
    "eyelid-vit-mlp": {},
    "eyelid-vit-ensemble-gaussian": {"encoding": GAUSSIAN},
    "eyelid-vit-query-johnson": {"encoding": JOHNSON},
    "eyelid-vit-mlp-sfp-finetune": {"features": FeatureConfig(kind="sfp"), "mode": "finetune"},
    "eyelid-seresnet-mlp-pyramid": {"features": FeatureConfig(kind="pyramid")},
    "eyelid-seresnet-query": {},
    "eyelid-efficientnet-ensemble": {},
    "eyelid-efficientnet-linear-sfp": {"features": FeatureConfig(kind="sfp")},
    "classify-vit-linear": {},
    "classify-vit-query": {},
    "classify-seresnet-ensemble-finetune": {"mode": "finetune"},
    "classify-efficientnet-mlp": {},
    "segment-vit-multiscale-finetune": {"mode": "finetune", "augment": True},
    "segment-seresnet-multiscale": {},
    "segment-efficientnet-multiscale": {},
}
"""{task-family-head-…: further choices}."""
HALF = (
    "eyelid-vit-ensemble-gaussian",
    "classify-efficientnet-mlp",
    "segment-vit-multiscale-finetune",
)
"""Built at fp16, the others at fp32: what half precision rounds is the models' own affair, and
those of a trained head are in the tests of each task."""


def make_backbone(family: str, path: Path) -> Path:
    torch.manual_seed(0)
    if family == "vit":
        vit = ViTConfig(
            name="tiny",
            embed_dim=32,
            depth=4,
            heads=2,
            ffn_dim=64,
            grid=(4, 4),
            position_rule="size",
        )
        model = init_weights_(VisionTransformer(vit))
        with torch.no_grad():
            # Weights of full size, as after training: the faint maps of fresh ones would be all
            # rounding once a group norm has taken their mean off.
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        save_backbone(model, path)
        return path
    width = {"seresnet": 0.125, "efficientnet": 0.25}[family]
    config = ConvNetConfig(name="small", family=family, width=width, depth=0.2)  # type: ignore[arg-type]
    save_convnet(init_convnet_(build_convnet(config)), path)
    return path


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    families = ("vit", "seresnet", "efficientnet")
    return {f: make_backbone(f, folder / f"{f}.safetensors") for f in families}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("matrix-data")
    for task, count in COUNTS.items():
        get_task(task).synthesise(count, 3, folder / task)
    return {task: folder / task for task in COUNTS}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix-features")


def test_the_matrix_holds_every_task_family_and_head():
    named = [name.split("-")[:3] for name in MATRIX]
    assert {task for task, _, _ in named} == TASKS.keys()
    for task in TASKS:
        assert {f for t, f, _ in named if t == task} == {"vit", "seresnet", "efficientnet"}
    heads = {head for _, _, head in named}
    assert heads == HEADS.keys()


@pytest.mark.parametrize("case", MATRIX)
def test_the_whole_way(case, backbones, data, cache, tmp_path):
    task, family, head = case.split("-")[:3]
    checkpoint = train(
        TrainConfig(
            task=task,
            data=data[task],
            backbone=str(backbones[family]),
            out=tmp_path / "model.safetensors",
            image_size=SIZES[task],
            head=HEADS[head],
            epochs=2,
            batch_size=5,
            cache=cache,
            device="cpu",
            **MATRIX[case],
        )
    )
    judged = evaluate(checkpoint, data[task], split="all", cache=cache, device="cpu")
    assert judged["samples"] == COUNTS[task]
    assert judged["targets"]

    precision = "fp16" if case in HALF else "fp32"
    request = BuildRequest(task, "all", tmp_path / "out", checkpoint, precision)
    result = build(request, Reporter(enabled=False))
    for bundle in result.bundles:
        assert bundle.verdict.passed, (bundle.target, bundle.verdict.blame)
    assert {b.target for b in result.bundles} == {"onnx", "coreml", "tflite"}

    wanted, files = trained_answer(checkpoint, data[task], tmp_path)
    for bundle in result.bundles:
        found = predict_files(bundle.path, files).outputs
        assert list(found) == list(wanted), bundle.target
        for name, value in wanted.items():
            off = get_task(task).error(value[None], np.asarray(found[name], np.float64)[None])
            assert off <= budget_of(get_task(task), parse_recipe(precision)), (bundle.target, name)
    assert verify_bundle(result.bundles[0].path, None, Reporter(enabled=False)).passed


def trained_answer(
    checkpoint: Path, data: Path, folder: Path
) -> tuple[dict[str, np.ndarray], list[str]]:
    """What PyTorch gives for a sample, and the files of the pictures that it read."""
    model, config = load_checkpoint(checkpoint)
    dataset = model.task.read(data, image_size=config.image_size)
    inputs = [i.name for i in model.task.inputs]
    sample = next(s for s in dataset.samples if len(s.images) == len(inputs))
    loaded, _ = model.task.load(sample, config.image_size)
    pixels, files = {}, []
    for name in inputs:
        Image.fromarray(loaded[name]).save(folder / f"{name}.png")
        files.append(f"{name}={folder / name}.png")
        pixels[name] = torch.from_numpy(loaded[name]).permute(2, 0, 1)[None]
    with torch.no_grad():
        outputs = model(pixels)
    return {name: value[0].double().numpy() for name, value in outputs.items()}, files
