"""Small stand-ins that several test modules of training share."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinotrain.backbones.convnets.backbone import init_weights_ as init_convnet_weights_
from dinotrain.backbones.convnets.config import ConvNetConfig
from dinotrain.backbones.convnets.table import build_convnet
from dinotrain.backbones.convnets.weights import save_convnet
from dinotrain.backbones.vit import VisionTransformer, ViTConfig, init_weights_
from dinotrain.backbones.weights import save_backbone
from dinotrain.heads.branch import HeadConfig
from dinotrain.train_config import TrainConfig

COLUMNS = ("subject_id", "eye", "gaze", "path", "mrd1_mm", "mrd2_mm", "lf_mm", "split")


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory) -> Path:
    """Return a file with a random backbone of 4 blocks, 16 wide."""
    config = ViTConfig(name="tiny", embed_dim=16, depth=4, heads=2, ffn_dim=32, grid=(2, 2))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = init_weights_(VisionTransformer(config))
    path = tmp_path_factory.mktemp("backbone") / "tiny.safetensors"
    save_backbone(model, path)
    return path


@pytest.fixture(scope="session")
def tiny_convnet(tmp_path_factory) -> Path:
    """Return a file with a small random EfficientNet."""
    config = ConvNetConfig(name="small", family="efficientnet", width=0.25, depth=0.3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = init_convnet_weights_(build_convnet(config))
    path = tmp_path_factory.mktemp("convnet") / "small.safetensors"
    save_convnet(model, path)
    return path


@pytest.fixture(scope="session")
def tiny_eyes(tmp_path_factory) -> Path:
    """Return a folder of 30 subjects whose pictures are bars at the labelled heights."""
    folder = tmp_path_factory.mktemp("eyes")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(30):
        mrd1, mrd2, lf = rng.uniform(0, 6), rng.uniform(3, 8), rng.uniform(4, 20)
        split = "val" if number % 5 == 3 else "test" if number % 5 == 4 else "train"
        # Some eyes lack a gaze, some a label: both are ordinary.
        gazes = ("primary",) if number % 7 == 6 else ("primary", "up", "down")
        for gaze in gazes:
            lift = {"primary": 0, "up": -lf / 2, "down": lf / 2}[gaze]
            image = rng.integers(90, 110, (56, 56, 3)).astype(np.uint8)
            image[int(28 - 2 * mrd1 + lift) : int(28 + 2 * mrd2 + lift)] += 100
            name = f"{number}_{gaze}.png"
            Image.fromarray(image).save(folder / name)
            labels = (f"{mrd1:.3f}", f"{mrd2:.3f}", "" if number % 6 == 5 else f"{lf:.3f}")
            rows.append((f"s{number}", "LR"[number % 2], gaze, name, *labels, split))
    with (folder / "manifest.csv").open("w", newline="") as text:
        csv.writer(text).writerows([COLUMNS, *rows])
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Return the folder of features that runs of one module share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def config(tiny_eyes, tiny_backbone, cache, tmp_path) -> TrainConfig:
    """Return a short run: an MLP on the small backbone."""
    return TrainConfig(
        data=tiny_eyes,
        backbone=str(tiny_backbone),
        out=tmp_path / "model.safetensors",
        image_size=(28, 28),
        head=HeadConfig(hidden=16),
        batch_size=8,
        epochs=4,
        cache=cache,
        device="cpu",
    )
