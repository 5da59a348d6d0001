"""A tiny trained-looking checkpoint and the bundles built from it, made once per session."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dinoexport.console import Reporter
from dinoexport.pipeline import BuildRequest, build
from dinotrain.backbones.vit import ViTConfig, init_weights_
from dinotrain.checkpoint import CheckpointConfig, save_checkpoint
from dinotrain.heads.branch import HeadConfig
from dinotrain.model import TaskModel

TINY_SIZE = 56


def make_checkpoint(path: Path, seed: int = 0, members: int = 1) -> Path:
    """Write a checkpoint of a two-block backbone with registers, all weights random."""
    torch.manual_seed(seed)
    backbone = ViTConfig(
        name="tiny",
        embed_dim=64,
        depth=2,
        heads=1,
        ffn_dim=128,
        grid=(4, 4),
        registers=2,
        position_rule="size_antialias",
    )
    head = HeadConfig(kind="ensemble", members=members) if members > 1 else HeadConfig(hidden=32)
    config = CheckpointConfig(
        task="eyelid",
        backbone=backbone,
        image_size=(TINY_SIZE, TINY_SIZE),
        head=head,
        trained_on="nothing (random weights)",
        notice="Random weights.",
    )
    model = TaskModel(config)
    init_weights_(model.backbone)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return save_checkpoint(model, config, path)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors")


@pytest.fixture(scope="session")
def built(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """Give the bundle of (target, precision), built at the first request; do not change it."""
    out = tmp_path_factory.mktemp("bundles")
    done: dict[tuple[str, str], Path] = {}

    def bundle(target: str, precision: str) -> Path:
        key = (target, precision)
        if key not in done:
            request = BuildRequest("eyelid", target, out, tiny_checkpoint, precision)
            result = build(request, Reporter(enabled=False))
            done[key] = result.bundles[0].path
        return done[key]

    return bundle
