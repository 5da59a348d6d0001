"""A tiny trained-looking checkpoint, the bundles built from it, models of random weights in every
shape that a checkpoint may have, random pictures, and a manifest written by hand.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dinoexport.console import Reporter
from dinoexport.manifest import (
    Blame,
    BudgetRecord,
    CheckpointRecord,
    FileRecord,
    InputSpec,
    Manifest,
    OutputParity,
    Preprocessing,
    ReferenceRecord,
    Structure,
    TapParity,
    Verdict,
)
from dinoexport.pipeline import build
from dinoexport.plan import BuildRequest
from dinotrain.backbones.vit import VisionTransformer, ViTConfig, init_weights_
from dinotrain.checkpoint import CheckpointConfig, save_checkpoint
from dinotrain.heads.branch import HeadConfig
from dinotrain.model import ModelConfig, TaskModel
from dinotrain.tasks.base import OutputSpec

TINY_SIZE = 56
# ViT-S in small: several heads, an MLP four times as wide.
SMALL = ViTConfig(
    name="small", embed_dim=48, depth=4, heads=3, ffn_dim=192, grid=(4, 4), position_rule="scale"
)


def _set_everything(model: TaskModel, seed: int) -> None:
    """No parameter keeps an initial value (0 or 1) at which a forgotten one would not show."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model.backbone, VisionTransformer):
        init_weights_(model.backbone)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for member in getattr(model.head, "members", ()):
            for branch in member.values():
                branch[-1].weight.mul_(4)
    if model.config.encoding.kind == "scalar":
        model.decoder.mean.copy_(torch.tensor([2.0, 5.0, 11.0]))
        model.decoder.std.copy_(torch.tensor([1.5, 2.5, 4.0]))


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


@pytest.fixture(scope="session")
def random_model() -> Callable[..., TaskModel]:
    """Make a model of random weights, in eval mode; arguments change its ModelConfig."""

    def make(seed: int = 0, **changes) -> TaskModel:
        torch.manual_seed(seed)
        model = TaskModel(
            ModelConfig(
                **{"task": "eyelid", "backbone": SMALL, "image_size": (56, 56)} | changes  # type: ignore[arg-type]
            )
        )
        _set_everything(model, seed)
        return model.eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def random_pixels() -> Callable[..., tuple[Tensor, ...]]:
    """Give (1, 3, H, W) float32 pixels of whole numbers 0..255, one per input of the task."""

    def make(seed: int, image_size: tuple[int, int]) -> tuple[Tensor, ...]:
        values = np.random.default_rng(seed).integers(0, 256, (3, 1, 3, *image_size))
        return tuple(torch.from_numpy(values.astype(np.float32)))

    return make


@pytest.fixture
def manifest() -> Manifest:
    """A manifest with something in every place, of files that are nowhere."""
    return Manifest(
        name="eyelid-tiny",
        task="eyelid",
        target="coreml",
        precision="fp16",
        budget=BudgetRecord(
            option="max-error-mm",
            unit="mm",
            allowed=0.1,
            measured=0.0625,
            samples=16,
            source="eyes.csv, test split",
            pixels_sha256="2" * 64,
            artifact_sha256="3" * 64,
            passed=True,
        ),
        artifact="eyelid-tiny.mlpackage",
        minimum_os="iOS 17",
        inputs=(
            InputSpec(
                name="primary",
                shape=(56, 56, 3),
                dtype="uint8",
                layout="image RGB",
                description="the eye in primary gaze",
            ),
        ),
        outputs=(
            OutputSpec(
                name="lf_mm", unit="mm", shape=(1,), dtype="float32", description="lid excursion"
            ),
        ),
        preprocessing=Preprocessing(
            window_mm=40.0, orientation="right", app="crop, 56×56", model="normalises"
        ),
        class_names=("a", "b"),
        files={"eyelid-tiny.mlpackage/model": FileRecord(sha256="0" * 64, size_bytes=3)},
        checkpoint=CheckpointRecord(
            name="tiny.safetensors", sha256="1" * 64, trained_on="nothing", position_rule="size"
        ),
        taps={"tokens": "value_1"},
        tools={"torch": "2"},
        licence="Apache-2.0",
        notice="Random weights.",
        parity=Verdict(
            passed=False,
            runtime="Core ML evaluator",
            reference=ReferenceRecord(
                device="CPU", versions={"torch": "2"}, samples=6, checkpoint_sha256="1" * 64
            ),
            outputs={
                "lf_mm": OutputParity(
                    unit="mm", max_error=1.5e-05, budget=0.02, sqnr_db=61.3, passed=True
                )
            },
            structure=Structure(
                runtime="NumPy",
                threshold_db=110.0,
                worst_tap="tokens",
                worst_db=20.5,
                gelu=("exact",),
                epsilons=(1e-06,),
                passed=False,
            ),
            taps={"tokens": TapParity(structure_db=20.5, precision_db=20.1, cosine=0.995)},
            blame=Blame(
                gate="structure",
                layer="tokens",
                sqnr_db=20.5,
                previous_layer="input",
                previous_db=200.0,
                message="the artifact leaves the reference at tokens",
            ),
        ),
    )
