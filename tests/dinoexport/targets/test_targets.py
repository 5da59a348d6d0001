"""The same model in every target: one contract, one set of values, whatever the head."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from dinoexport.bundle import open_bundle
from dinoexport.console import Reporter
from dinoexport.pipeline import build
from dinoexport.plan import BuildRequest
from dinoexport.recipes import parse_recipe
from dinoexport.targets.base import Target
from dinoexport.targets.table import TABLE, expand_targets, get_target
from dinoexport.verify.parity import budget_of
from dinoexport.verify.reference_file import load_reference
from dinotrain.backbones.vit import ViTConfig, init_weights_
from dinotrain.checkpoint import CheckpointConfig, save_checkpoint
from dinotrain.encoding import Encoding
from dinotrain.errors import UsageError
from dinotrain.heads.branch import HeadConfig
from dinotrain.heads.pool import FeatureConfig
from dinotrain.model import TaskModel
from dinotrain.tasks import get_task

TARGETS = ("onnx", "tflite", "coreml")
BUILDS = [
    pytest.param(target, precision, id=f"{target}-{precision}")
    for target in TARGETS
    for precision in ("fp32", "fp16")
]
TINY = ViTConfig(
    name="tiny", embed_dim=32, depth=1, heads=1, ffn_dim=48, grid=(4, 4), position_rule="size"
)
VARIANTS = {
    # Taps out of order and twice, cut before the last block, an image that is not square.
    "pyramid-ensemble-gray-hard": (
        {
            "backbone": msgspec.structs.replace(TINY, depth=3, ffn="swiglu", registers=1),
            "features": FeatureConfig(kind="pyramid", taps=(0, 1, 0, 1), tap_norm="own_ln"),
            "head": HeadConfig(kind="ensemble", members=2, hidden=16),
            "encoding": Encoding(kind="gray", bits=6, decoding="hard"),
            "image_size": (42, 70),
        },
        "fp32",
    ),
    "linear-plain-soft": (
        {"head": HeadConfig(kind="linear"), "encoding": Encoding(kind="plain", bits=5)},
        "fp16",
    ),
    "mlp-scalar": (
        {"head": HeadConfig(hidden=16), "encoding": Encoding(kind="scalar")},
        "fp16",
    ),
}


def make_variant(config: dict, path: Path) -> Path:
    """Write a checkpoint of random weights."""
    torch.manual_seed(3)
    full = CheckpointConfig(**{"task": "eyelid", "backbone": TINY, "image_size": (42, 42)} | config)
    model = TaskModel(full)
    init_weights_(model.backbone)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return save_checkpoint(model, full, path)


def output_facts(bundle: Path) -> list:
    return list(open_bundle(bundle).manifest.outputs)


def run(bundle: Path, count: int = 3) -> dict[str, np.ndarray]:
    """Outputs of the shipped artifact on rendered eyes, {name: (count,)}."""
    opened = open_bundle(bundle)
    runtime = get_target(opened.manifest.target).runtime(opened.artifact)
    size = opened.manifest.inputs[0].shape[-3:-1]
    rows = [runtime.run(eyes).outputs for eyes in get_task("eyelid").render_samples(count, size)]
    for row in rows:
        assert all(v.shape == (1,) and v.dtype == np.float32 for v in row.values())
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def test_table_names_every_target_and_refuses_others():
    assert tuple(sorted(TABLE)) == tuple(sorted(TARGETS)) == tuple(sorted(expand_targets("all")))
    for name in TARGETS:
        assert isinstance(get_target(name), Target)
        assert get_target(name).name == name
        assert expand_targets(name) == [name]
    for call in (get_target, expand_targets):
        with pytest.raises(UsageError, match="Did you mean 'onnx'"):
            call("onxx")


@pytest.mark.e2e
@pytest.mark.parametrize(("target", "precision"), BUILDS)
def test_outputs_are_the_same_in_every_target(built, target, precision):
    bundle = built(target, precision)
    assert output_facts(bundle) == output_facts(built("onnx", "fp32"))
    assert [o.name for o in output_facts(bundle)] == ["mrd1_mm", "mrd2_mm", "lf_mm"]
    assert list(run(bundle, 1)) == ["mrd1_mm", "mrd2_mm", "lf_mm"]
    for output in output_facts(bundle):
        assert (output.shape, output.dtype, output.unit) == ((1,), "float32", "mm")


@pytest.mark.e2e
@pytest.mark.parametrize(("target", "precision"), BUILDS)
def test_values_of_all_targets_agree_within_the_budget(built, target, precision):
    reference, got = run(built("onnx", "fp32")), run(built(target, precision))
    budget = budget_of(get_task("eyelid"), parse_recipe(precision))
    for name, wanted in reference.items():
        # Both may be off by their own budget, in opposite directions.
        np.testing.assert_allclose(got[name], wanted, atol=budget + 0.001, rtol=0)
        assert np.ptp(wanted) > 0, "the samples do not tell a constant from a model"


@pytest.mark.e2e
@pytest.mark.parametrize(("target", "precision"), BUILDS)
def test_metadata_inside_the_file_is_the_manifest(built, target, precision):
    bundle = open_bundle(built(target, precision))
    manifest = bundle.manifest
    found = get_target(target).read_metadata(bundle.artifact)
    plain = ("name", "task", "precision", "licence", "notice")
    assert {k: found[k] for k in plain} == {k: getattr(manifest, k) for k in plain}
    assert found["checkpoint"] == manifest.checkpoint.name
    assert found["checkpoint_sha256"] == manifest.checkpoint.sha256
    assert found["trained_on"] == manifest.checkpoint.trained_on
    for key in ("outputs", "preprocessing", "tools"):
        outside = msgspec.json.encode(getattr(manifest, key))
        assert msgspec.json.decode(found[key]) == msgspec.json.decode(outside), key
    for port in manifest.inputs:
        assert found[f"input.{port.name}"] == port.description
    for port in manifest.outputs:
        assert found[f"output.{port.name}"] == f"{port.description} ({port.unit})"


@pytest.mark.e2e
@pytest.mark.parametrize("target", TARGETS)
def test_half_precision_halves_the_weights(built, target):
    """Compared by what is not weights: graph and metadata stay, 4 bytes a weight become 2."""
    full, half = (open_bundle(built(target, p)) for p in ("fp32", "fp16"))
    reference = load_reference(full.reference)
    assert reference.samples == 6
    saved = full.size_bytes() - half.size_bytes()
    # Weight matrices of the tiny model: patch, qkv, proj, fc1, fc2 of two blocks, and the heads.
    matrices = 588 * 64 + 2 * (4 * 64 * 64 + 2 * 64 * 128) + (128 + 384) * 32 + 32 * 24
    assert saved == pytest.approx(2 * matrices, rel=0.15)


@pytest.mark.e2e
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_head_and_decoding_builds(tmp_path_factory, variant, target):
    config, precision = VARIANTS[variant]
    folder = tmp_path_factory.mktemp(variant)
    checkpoint = make_variant(config, folder / "variant.safetensors")
    request = BuildRequest("eyelid", target, folder, checkpoint, precision)
    result = build(request, Reporter(enabled=False))
    (bundle,) = result.bundles
    assert result.passed, bundle.verdict.blame
    names = [o.name for o in output_facts(bundle.path)]
    wanted = ["mrd1_mm", "mrd2_mm", "lf_mm"]
    if "ensemble" in variant:
        wanted += ["mrd1_std_mm", "mrd2_std_mm", "lf_std_mm"]
    assert names == wanted
    blocks = {tap for tap in bundle.verdict.taps if tap.endswith(".mlp")}
    assert blocks == {"blocks.0.mlp"} | ({"blocks.1.mlp"} if "pyramid" in variant else set())
