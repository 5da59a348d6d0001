"""One entry for every backbone: names, files told by their keys, and what is refused."""

import pytest
import torch

from dinotrain.backbones.convnets.backbone import ConvNet
from dinotrain.backbones.convnets.config import CONVNETS
from dinotrain.backbones.loading import NAMES, load_backbone
from dinotrain.backbones.vit import VARIANTS, VisionTransformer
from dinotrain.errors import ShapeError, UsageError, WeightsError


def test_files_are_told_by_their_keys(tiny_backbone, tiny_convnet):
    assert isinstance(load_backbone(tiny_backbone, 56), VisionTransformer)
    assert isinstance(load_backbone(str(tiny_convnet), 33), ConvNet)


def test_position_rule_is_for_transformers(tiny_backbone, tiny_convnet):
    model = load_backbone(tiny_backbone, position_rule="size")
    assert isinstance(model, VisionTransformer)
    assert model.config.position_rule == "size"
    for source in (tiny_convnet, "seresnet50"):
        with pytest.raises(UsageError, match="which has no positions"):
            load_backbone(source, position_rule="size")


def test_image_sizes_are_checked_by_kind(tiny_backbone, tiny_convnet):
    with pytest.raises(ShapeError, match="multiple of the patch size 14"):
        load_backbone(tiny_backbone, 60)
    with pytest.raises(ShapeError, match="under 32"):
        load_backbone(tiny_convnet, 28)
    # Before any download.
    with pytest.raises(ShapeError, match="under 32"):
        load_backbone("efficientnet_b0", 28)
    with pytest.raises(ShapeError, match="patch size 14"):
        load_backbone("dinov2_vits14", 60)


def test_unknown_names_are_held_against_all_known(tmp_path):
    with pytest.raises(UsageError, match="Did you mean 'efficientnet_b0'") as error:
        load_backbone("efficientnet-b0")
    assert "dinov2_vits14" in str(error.value)
    with pytest.raises(UsageError, match="no published weights"):
        load_backbone("efficientnet_b7")
    assert {*VARIANTS, "seresnet50.a1_in1k"} <= set(NAMES)
    assert len(NAMES) == len(set(NAMES))


def test_foreign_file_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"a\.pth"):
        load_backbone(tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="no such file"):
        load_backbone("seresnet50.pth")


def test_published_names_are_all_architectures():
    known = {*VARIANTS, *CONVNETS}

    assert {name.partition(".")[0] for name in NAMES} <= known
