"""Checkpoints: what is written comes back, and every hostile file is refused in one line."""

import json
import pickle
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from dinotrain.backbones.vit import ViTConfig
from dinotrain.checkpoint import (
    CheckpointConfig,
    load_checkpoint,
    read_config,
    save_checkpoint,
)
from dinotrain.digests import digest
from dinotrain.errors import CheckpointError
from dinotrain.heads.branch import HeadConfig
from dinotrain.model import TaskModel

CONFIG = CheckpointConfig(
    task="eyelid",
    backbone=ViTConfig(name="tiny", embed_dim=16, depth=2, heads=2, ffn_dim=32, grid=(2, 2)),
    image_size=(28, 28),
    head=HeadConfig(hidden=8),
    trained_on="noise",
    metrics={"test": {"mrd1_mm": {"mae_mm": 0.5, "r2": None}}},
)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = TaskModel(CONFIG).eval()
    return model, save_checkpoint(model, CONFIG, tmp_path / "model.safetensors")


def rewrite(path, metadata=None, **changes):
    """Write a checkpoint again with another header, or other tensors."""
    state = load_file(path) | changes
    if metadata is None:
        metadata = {"config": json.dumps(header(path))}
    save_file({k: v for k, v in state.items() if v is not None}, path, metadata=metadata)


def header(path) -> dict:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["config"])


def test_round_trip_is_exact(saved):
    model, path = saved
    found, config = load_checkpoint(path)
    assert config == CONFIG
    assert read_config(path) == CONFIG
    for (name, a), (other, b) in zip(
        sorted(model.state_dict().items()), sorted(found.state_dict().items()), strict=True
    ):
        assert name == other
        assert torch.equal(a, b)
    pixels = {i.name: torch.randint(0, 256, (1, 3, 28, 28)) for i in model.task.inputs}
    for name, value in model(pixels).items():
        assert torch.equal(value, found(pixels)[name])


def test_the_same_model_gives_the_same_bytes(saved, tmp_path):
    model, path = saved
    again = save_checkpoint(model, CONFIG, tmp_path / "again.safetensors")
    assert digest(again) == digest(path)


def test_half_precision_halves_the_file_and_loads_as_float32(saved, tmp_path):
    model, path = saved
    half = save_checkpoint(model, CONFIG, tmp_path / "half.safetensors", torch.float16)
    assert half.stat().st_size < 0.75 * path.stat().st_size
    found, _ = load_checkpoint(half)
    assert {p.dtype for p in found.parameters()} == {torch.float32}


def test_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.safetensors")


@pytest.mark.parametrize("size", [0, 4, 8, 300])
def test_a_truncated_header(saved, size):
    _, path = saved
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="truncated"):
        load_checkpoint(path)


def test_truncated_weights(saved):
    _, path = saved
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="weights do not fit"):
        load_checkpoint(path)


def test_a_pickle_by_another_name_is_never_opened(tmp_path):
    path = tmp_path / "evil.safetensors"
    flag = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(flag), "w"))

    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"not a \.safetensors"):
        load_checkpoint(path)
    torch.save({"a": Evil()}, path)
    with pytest.raises(CheckpointError, match=r"not a \.safetensors"):
        load_checkpoint(path)
    assert not flag.exists()


def test_a_foreign_safetensors(tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="no trained checkpoint"):
        load_checkpoint(path)


def test_an_unknown_key_in_the_config(saved):
    _, path = saved
    rewrite(path, {"config": json.dumps(header(path) | {"colour": "red"})})
    with pytest.raises(CheckpointError, match="colour"):
        load_checkpoint(path)


@pytest.mark.parametrize("text", ["[]", "7", "{", '{"format_version": 2}'])
def test_a_config_that_is_none(saved, text):
    _, path = saved
    rewrite(path, {"config": text})
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(path)


def test_another_version(saved):
    _, path = saved
    rewrite(path, {"config": json.dumps(header(path) | {"format_version": 99})})
    with pytest.raises(CheckpointError, match="format 99"):
        load_checkpoint(path)


def test_an_unknown_task(saved):
    _, path = saved
    rewrite(path, {"config": json.dumps(header(path) | {"task": "eyelids"})})
    with pytest.raises(CheckpointError, match="Did you mean 'eyelid'"):
        load_checkpoint(path)


def test_missing_and_foreign_tensors(saved):
    _, path = saved
    rewrite(path, extra=torch.zeros(1))
    with pytest.raises(CheckpointError, match="extra"):
        load_checkpoint(path)
    rewrite(path, extra=None, **{"backbone.norm.weight": None})
    with pytest.raises(CheckpointError, match=r"backbone\.norm\.weight"):
        load_checkpoint(path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_weights_that_are_not_finite(saved, bad):
    _, path = saved
    rewrite(path, **{"backbone.norm.weight": torch.full((16,), bad)})
    with pytest.raises(CheckpointError, match=r"backbone\.norm\.weight holds NaN"):
        load_checkpoint(path)


def test_a_wrong_suffix(saved, tmp_path):
    model, _ = saved
    with pytest.raises(CheckpointError, match=r"ends in \.safetensors"):
        save_checkpoint(model, CONFIG, tmp_path / "model.pth")


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch):
    model, path = saved
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("dinotrain.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(model, CONFIG, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
