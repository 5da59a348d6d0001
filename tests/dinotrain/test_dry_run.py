"""The dry run: what it says is what the run then does, and it leaves no trace."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from PIL import Image

from dinotrain.backbones import load_backbone
from dinotrain.checkpoint import load_checkpoint
from dinotrain.dry_run import describe_run
from dinotrain.errors import DataError, UsageError
from dinotrain.fit import build_model, decide, train
from dinotrain.heads.branch import HeadConfig
from dinotrain.heads.pool import FeatureConfig
from dinotrain.model import TaskModel
from dinotrain.train_config import TrainConfig


@pytest.fixture
def config(config: TrainConfig, tmp_path: Path) -> TrainConfig:
    """Return a run whose folders do not exist yet."""
    out = tmp_path / "run" / "model.safetensors"
    return replace(config, out=out, epochs=2, cache=tmp_path / "cache")


def disk_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"augment": True, "augment_copies": 2, "cache_precision": "float16"},
        {"features": FeatureConfig(kind="pyramid"), "accumulate": 2},
    ],
    ids=["vector", "copies in half precision", "pyramid"],
)
def test_the_run_is_what_was_said(config, fields, tmp_path):
    config = replace(config, **fields)
    plan = describe_run(config)
    assert list(tmp_path.iterdir()) == []
    train(config)
    model, header = load_checkpoint(config.out)
    parameters = dict(model.named_parameters())
    assert plan["parameters"]["whole"] == sum(p.numel() for p in parameters.values())
    trained = [p.numel() for name, p in parameters.items() if not name.startswith("backbone.")]
    assert plan["parameters"]["trained"] == sum(trained)
    assert plan["recipe"] == {name: header.training[name] for name in config.recipe()}
    # The estimate is for a full disk: a tenth more or less is the same to it.
    cache = plan["cache"]
    files = list((tmp_path / "cache").rglob("*.safetensors"))
    assert cache["entries"] == len(files)
    assert cache["bytes"] == pytest.approx(disk_bytes(tmp_path / "cache"), rel=0.1, abs=50_000)
    assert (cache["present"], cache["new_bytes"]) == (0, cache["bytes"])
    again = describe_run(config)
    assert (again["cache"]["present"], again["cache"]["new_bytes"]) == (len(files), 0)
    assert [entry["replaces"] for entry in again["writes"]] == [True, False]
    assert plan["data"]["splits"] == {"train": 18, "val": 6, "test": 6}
    batches = math.ceil(18 / 8)
    assert plan["steps"] == {
        "batches_per_epoch": batches,
        "steps_per_epoch": math.ceil(batches / config.accumulate),
        "epochs": 2,
        "steps": 2 * math.ceil(batches / config.accumulate),
    }


def real_shapes(config: TrainConfig, model: TaskModel) -> tuple[list, list]:
    """Shapes that a real picture has, which the dry run must tell without one."""
    height, width = config.image_size
    features = model.extract(torch.zeros(1, 3, height, width))
    logits = model.logits({spec.name: features for spec in model.task.inputs})
    return [list(x.shape) for x in features], list(logits.shape)


@pytest.mark.parametrize(
    ("head", "features"),
    [("mlp", "cls4_mean"), ("query", "tokens"), ("ensemble", "sfp"), ("linear", "cls_quarters")],
)
def test_shapes_are_those_of_the_model(config, head, features):
    config = replace(config, head=HeadConfig(kind=head), features=FeatureConfig(kind=features))
    plan = describe_run(config)
    backbone = load_backbone(config.backbone)
    model = build_model(decide(config, backbone), backbone).eval()
    wanted, logits = real_shapes(config, model)
    assert list(plan["shapes"]["features"].values()) == wanted
    assert plan["shapes"]["logits"] == logits
    names = [spec["name"] for spec in plan["shapes"]["outputs"]]
    assert names[:3] == ["mrd1_mm", "mrd2_mm", "lf_mm"]
    assert plan["shapes"]["inputs"]["up"] == [1, 3, 28, 28]


def test_a_backbone_that_trains_keeps_no_features(config):
    plan = describe_run(replace(config, mode="finetune"))
    assert plan["cache"] is None
    assert plan["parameters"]["trained"] == plan["parameters"]["whole"]


def test_shapes_of_a_convnet(config, tiny_convnet):
    plan = describe_run(
        replace(
            config,
            backbone=str(tiny_convnet),
            image_size=(32, 32),
            features=FeatureConfig(kind="pyramid"),
        )
    )
    taps = plan["shapes"]["features"]
    assert list(taps) == ["tap 4", "tap 8", "tap 16", "tap 32"]
    assert [shape[2:] for shape in taps.values()] == [[8, 8], [4, 4], [2, 2], [1, 1]]
    assert plan["parameters"]["parts"]["pool"]["trained"] > 0


def test_shapes_of_masks(tmp_path, tiny_backbone):
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    (tmp_path / "data" / "classes.txt").write_text("ground\ndust\nscratch")
    for number in range(6):
        pixels = rng.integers(0, 255, (56, 56, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / "images" / f"{number}.png")
        ids = (pixels[..., 0] % 2).astype(np.uint8)
        Image.fromarray(ids).save(tmp_path / "data" / "masks" / f"{number}.png")
    config = TrainConfig(
        task="segment",
        data=tmp_path / "data",
        backbone=str(tiny_backbone),
        out=tmp_path / "x.safetensors",
        image_size=(56, 56),
        cache=tmp_path / "cache",
    )
    plan = describe_run(config)
    assert [shape[1:] for shape in plan["shapes"]["features"].values()] == [[16, 4, 4]] * 3
    assert plan["shapes"]["logits"] == [1, 3, 56, 56]
    (spec,) = plan["shapes"]["outputs"]
    assert spec == {"name": "class_map", "unit": "class", "shape": [1, 56, 56], "dtype": "int32"}
    assert plan["data"]["classes"]["scratch"]["train"] == 0
    assert "class 2 'scratch' is empty: no sample shows it" in plan["data"]["notes"]
    assert plan["data"]["shares"]["dust"]["train"] == pytest.approx(0.5, abs=0.05)


def test_classes_are_counted(tmp_path, tiny_backbone):
    rng = np.random.default_rng(0)
    for name, count in (("a", 12), ("b", 6)):
        for number in range(count):
            path = tmp_path / "data" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(path)
    plan = describe_run(
        TrainConfig(
            task="classify",
            data=tmp_path / "data",
            backbone=str(tiny_backbone),
            out=tmp_path / "x.safetensors",
            image_size=(28, 28),
            cache=tmp_path / "cache",
        )
    )
    assert sum(plan["data"]["classes"]["a"].values()) == 12
    assert plan["shapes"]["outputs"][0]["shape"] == [1, 2]
    assert any("class 'b'" in note for note in plan["data"]["notes"])


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"loss": "mse"}, UsageError, "does not fit encoding"),
        ({"strategy": "fsdp"}, UsageError, "shards over GPUs"),
        ({"data": Path("/nowhere")}, DataError, "no such manifest"),
    ],
    ids=str,
)
def test_what_the_run_would_refuse_is_refused(config, fields, error, message):
    with pytest.raises(error, match=message):
        describe_run(replace(config, **fields))
