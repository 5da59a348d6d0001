"""Columns for the Neural Engine, a last block of one row and guarded norms, on every target."""

from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

from dinoexport.bundle import open_bundle
from dinoexport.console import Reporter
from dinoexport.graph.capture import capture_deploy
from dinoexport.graph.deploy_norms import SafeNorm
from dinoexport.pipeline import build, make_deploy_model
from dinoexport.plan import BuildPlan, BuildRequest, plan_build
from dinoexport.quantize.prepare import prepare_
from dinoexport.targets.base import LowerOptions
from dinoexport.targets.table import get_target
from dinoexport.verify.parity import verify_artifact
from dinoexport.verify.reference import Reference, make_reference, with_deployed
from dinotrain.backbones.convnets.config import ConvNetConfig
from dinotrain.backbones.vit import ViTConfig, init_weights_
from dinotrain.checkpoint import CheckpointConfig, load_checkpoint, save_checkpoint
from dinotrain.errors import UsageError
from dinotrain.heads.branch import HeadConfig
from dinotrain.heads.pool import FeatureConfig
from dinotrain.model import TaskModel

pytestmark = pytest.mark.e2e
CONFIG = CheckpointConfig(
    task="classify",
    classes=("one", "two", "three"),
    backbone=ViTConfig(
        name="tiny", embed_dim=64, depth=2, heads=2, ffn="swiglu", ffn_dim=96, grid=(4, 4)
    ),
    features=FeatureConfig(kind="cls"),
    head=HeadConfig(kind="linear"),
    image_size=(56, 70),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that reads CLS alone; one channel of its tokens leaves block 0 at 300."""
    torch.manual_seed(0)
    model = TaskModel(CONFIG)
    init_weights_(model.backbone)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        block = model.backbone.blocks[0]
        block.mlp.w3.bias[5] = 300 / float(block.ls2.gamma[5])
    return save_checkpoint(model, CONFIG, tmp_path_factory.mktemp("layouts") / "cls.safetensors")


def request(checkpoint: Path, out: Path, target: str = "all", layout: str = "ane") -> BuildRequest:
    return BuildRequest("classify", target, out, checkpoint, "fp16", layout=layout)


def test_every_target_passes_in_columns(checkpoint, tmp_path):
    result = build(request(checkpoint, tmp_path), Reporter(enabled=False))
    assert len(result.bundles) == 3
    for built in result.bundles:
        verdict = built.verdict
        assert verdict.passed, (built.target, verdict.blame)
        assert built.path.name == f"classify-tiny-56x70-fp16-ane-{built.target}"
        # The guarded norms are found in the file with their epsilon, beside the others.
        assert verdict.structure.epsilons == (1.013e-06, 1.001e-05)
        target, artifact = get_target(built.target), open_bundle(built.path).artifact
        assert len(target.norm_epsilons(artifact)) == 6
        operations = target.count_operations(artifact)
        assert sum(operations.get(kind, 0) for kind in ("Conv", "CONV_2D", "conv")) == 13
        largest = {"onnx": "ReduceMax", "tflite": "REDUCE_MAX", "coreml": "reduce_max"}
        assert operations[largest[built.target]] == 3


def test_onnx_for_cpus_has_attention_in_one_operator(checkpoint, tmp_path):
    asked = request(checkpoint, tmp_path, "onnx", "cpu")
    (built,) = build(asked, Reporter(enabled=False)).bundles
    assert built.verdict.passed, built.verdict.blame
    bundle = open_bundle(built.path)
    assert built.path.name == "classify-tiny-56x70-fp16-cpu-onnx"
    assert bundle.manifest.layout == "cpu"
    operations = get_target("onnx").count_operations(bundle.artifact)
    assert operations["MultiHeadAttention"] == CONFIG.backbone.depth
    # That of the classes is left.
    assert operations["Softmax"] == 1


@pytest.fixture(scope="module")
def rows(checkpoint, tmp_path_factory) -> tuple[BuildPlan, TaskModel, Reference]:
    plan = plan_build(request(checkpoint, tmp_path_factory.mktemp("rows"), "onnx", "tokens"))
    model, _ = load_checkpoint(checkpoint)
    return plan, model, make_reference(model, "0" * 64, torch.device("cpu"))


def verdict_of(rows, path: Path, fault=lambda _: None):
    """Build one ONNX file as the pipeline does, with a fault in what is lowered."""
    plan, model, reference = rows
    deploy, faulted = (make_deploy_model(model, plan, reference) for _ in range(2))
    assert sum(isinstance(m, SafeNorm) for m in deploy.modules()) == 3
    prepare_(deploy, plan.recipe)
    layers = prepare_(faulted, plan.recipe)
    wanted = with_deployed(reference, plan.recipe.name, deploy, torch.device("cpu"))
    fault(faulted)
    target = get_target("onnx")
    taps = target.lower(capture_deploy(faulted, plan.recipe, layers), path, LowerOptions(), {})
    return verify_artifact(target, path, taps, plan.recipe, wanted, model.task)


def scale_epsilon(deploy: nn.Module) -> None:
    for module in deploy.modules():
        if isinstance(module, SafeNorm):
            module.eps *= 10


def test_a_wrong_epsilon_of_a_guarded_norm_is_caught(rows, tmp_path):
    """Of tokens of 300 no tap can tell."""
    verdict = verdict_of(rows, tmp_path / "model.onnx", scale_epsilon)
    assert not verdict.passed
    assert verdict.structure.worst_db >= 110
    assert "epsilon" in verdict.blame.message


def test_names_and_families_that_are_refused(checkpoint, tmp_path):
    with pytest.raises(UsageError, match=r"unknown layout 'anne'\. Did you mean 'ane'"):
        plan_build(request(checkpoint, tmp_path, layout="anne"))
    with pytest.raises(UsageError, match=r"cpu is not one of coreml\. Use --target onnx, or"):
        plan_build(request(checkpoint, tmp_path, "onnx,coreml", "cpu"))
    convnet = ConvNetConfig(name="small", family="seresnet", width=0.125, depth=0.1)
    config = msgspec.structs.replace(
        CONFIG, backbone=convnet, features=FeatureConfig(kind="pooled"), image_size=(64, 64)
    )
    path = save_checkpoint(TaskModel(config), config, tmp_path / "cnn.safetensors")
    with pytest.raises(UsageError, match=r"cnn\.safetensors has a convolutional backbone, small"):
        plan_build(request(path, tmp_path))
