"""The log of a backbone's training travels with the checkpoint that is built on it."""

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from dinotrain.backbones.vit import ViTConfig
from dinotrain.checkpoint import CheckpointConfig, read_config, save_checkpoint
from dinotrain.errors import CheckpointError
from dinotrain.model import TaskModel
from dinotrain.pretrain.embedded import keep_backbone_log

LOG = {"method": "dense", "log": [{"step": 1, "mrd1_mm": 0.5}]}


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    backbone = ViTConfig(
        name="t", embed_dim=16, depth=1, heads=1, ffn_dim=16, grid=(2, 2), position_rule="size"
    )
    config = CheckpointConfig(
        task="eyelid", backbone=backbone, image_size=(28, 28), training={"epochs": 3}
    )
    return save_checkpoint(TaskModel(config), config, tmp_path / "head.safetensors", torch.float16)


def test_log_is_added_and_nothing_else_changes(checkpoint, tmp_path):
    weights = tmp_path / "backbone.safetensors"
    save_file(
        {"a": torch.zeros(1)}, weights, metadata={"training": msgspec.json.encode(LOG).decode()}
    )
    before, state = read_config(checkpoint), load_file(checkpoint)
    keep_backbone_log(checkpoint, weights)
    after, kept = read_config(checkpoint), load_file(checkpoint)
    assert after.training == {"epochs": 3, "backbone": LOG}
    assert msgspec.structs.replace(after, training=before.training) == before
    assert all(torch.equal(state[name], kept[name]) for name in state)
    assert {value.dtype for value in kept.values()} == {torch.float16}


@pytest.mark.parametrize("metadata", [None, {"training": "[1]"}, {"training": "{"}])
def test_backbone_without_a_log_is_refused(checkpoint, tmp_path, metadata):
    weights = tmp_path / "backbone.safetensors"
    save_file({"a": torch.zeros(1)}, weights, metadata=metadata)
    before = checkpoint.read_bytes()
    with pytest.raises(CheckpointError, match="no log of its training"):
        keep_backbone_log(checkpoint, weights)
    assert checkpoint.read_bytes() == before
