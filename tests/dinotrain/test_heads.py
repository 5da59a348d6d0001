"""Heads and pools: shapes, members, and the pyramid against a slow reading of METHODS B6."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from dinotrain.backbones.convnets.config import CONVNETS
from dinotrain.backbones.convnets.table import build_convnet
from dinotrain.backbones.vit import VisionTransformer, ViTConfig, init_weights_
from dinotrain.errors import ShapeError, UsageError
from dinotrain.heads.branch import BranchHead, BranchSpec, HeadConfig, HeadKind
from dinotrain.heads.build import accepted_features, choose_features
from dinotrain.heads.pool import ClsParts, ClsPool, FeatureConfig, build_pool, mean_of_quarters

TINY = ViTConfig(name="tiny", embed_dim=16, depth=4, heads=2, ffn_dim=32, grid=(3, 3))
BRANCHES = [BranchSpec("mrd", 6, 2), BranchSpec("lf", 9, 1)]


@pytest.fixture
def backbone() -> VisionTransformer:
    torch.manual_seed(0)
    return init_weights_(VisionTransformer(TINY)).eval()


@pytest.mark.parametrize("kind", ["linear", "mlp", "ensemble"])
def test_all_kinds_give_one_shape(kind):
    config = HeadConfig(kind=kind, hidden=5, members=3)
    head = BranchHead(BRANCHES, 8, config).eval()
    vectors = {"mrd": torch.randn(4, 6), "lf": torch.randn(4, 9)}
    assert head(vectors).shape == (4, 3 if kind == "ensemble" else 1, 3, 8)


def test_a_linear_head_is_layer_norm_and_a_product():
    head = BranchHead(BRANCHES, 2, HeadConfig(kind="linear"))
    vectors = {"mrd": torch.randn(4, 6), "lf": torch.randn(4, 9)}
    norm, linear = head.members[0]["mrd"]
    x = vectors["mrd"]
    mean, var = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    z = (x - mean) / (var + norm.eps).sqrt()
    wanted = (z @ linear.weight.T + linear.bias).reshape(4, 2, 2)
    # Two orders of a sum of 6 float32 terms.
    torch.testing.assert_close(head(vectors)[:, 0, :2], wanted, atol=1e-5, rtol=1e-5)


def test_members_differ_and_output_weights_are_rows_per_target():
    head = BranchHead(BRANCHES, 8, HeadConfig(kind="ensemble", hidden=5, members=2))
    weights = head.output_weights()
    assert [tuple(w.shape) for w in weights] == [(2, 8, 5), (1, 8, 5)] * 2
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(weights[0][1], head.members[0]["mrd"][-1].weight[8:])


def test_output_biases_are_those_of_every_member():
    head = BranchHead(BRANCHES, 2, HeadConfig(kind="ensemble", hidden=5, members=2)).eval()
    bias = torch.arange(6.0).reshape(3, 2)
    head.set_output_bias_(bias)
    for weight in head.output_weights():
        weight.data.zero_()
    vectors = {"mrd": torch.randn(4, 6), "lf": torch.randn(4, 9)}
    assert torch.equal(head(vectors), bias.expand(4, 2, 3, 2))
    with pytest.raises(ShapeError, match=r"shape \(2, 3\).*3 targets of 2 logits each"):
        head.set_output_bias_(bias.T)


@pytest.mark.parametrize(
    ("kind", "count"), [("probe", 0), ("linear", 0), ("mlp", 2), ("ensemble", 6)]
)
def test_hidden_weights_are_all_before_the_output(kind, count):
    head = BranchHead(BRANCHES, 2, HeadConfig(kind=kind, hidden=5, members=3))
    hidden = head.hidden_weights()
    assert [tuple(w.shape) for w in hidden] == [(5, 6), (5, 9)] * (count // 2)
    known = {id(p) for p in head.parameters()}
    assert all(id(w) in known for w in hidden)


def test_an_ensemble_of_one_is_refused():
    with pytest.raises(UsageError, match="at least 2"):
        HeadConfig(kind="ensemble", members=1)


def test_cls_mean_is_cls_and_the_mean_patch(backbone):
    images = torch.randn(2, 3, 42, 42)
    (found,) = ClsPool(TINY, ClsParts(), (42, 42)).extract(backbone, images)
    tokens = backbone.norm(
        backbone.blocks[3](
            backbone.blocks[2](backbone.blocks[1](backbone.blocks[0](backbone.tokens(images))))
        )
    )
    torch.testing.assert_close(found[:, :16], tokens[:, 0])
    torch.testing.assert_close(found[:, 16:], tokens[:, 1:].sum(1) / 9)


@pytest.mark.parametrize("grid", [(4, 6), (5, 3), (1, 2)], ids=str)
def test_quarters_against_adaptive_pooling(grid):
    maps = torch.randn(2, 16, *grid)
    found = torch.stack(mean_of_quarters(maps.flatten(2).mT, grid), dim=1)
    torch.testing.assert_close(found, F.adaptive_avg_pool2d(maps, 2).flatten(2).mT)


def test_quarters_stand_behind_cls_and_mean(backbone):
    images = torch.randn(2, 3, 56, 28)
    pools = {
        k: build_pool(TINY, FeatureConfig(kind=k), (56, 28)) for k in ("cls4_mean", "cls4_quarters")
    }
    found = {kind: pool.extract(backbone, images)[0] for kind, pool in pools.items()}
    assert {kind: pool.width for kind, pool in pools.items()} == {
        "cls4_mean": 5 * 16,
        "cls4_quarters": 9 * 16,
    }
    assert torch.equal(found["cls4_quarters"][:, : 5 * 16], found["cls4_mean"])
    quarters = found["cls4_quarters"][:, 5 * 16 :].unflatten(1, (4, 16))
    torch.testing.assert_close(quarters.mean(1), found["cls4_mean"][:, 4 * 16 :])
    # The top left quarter of a 4×2 grid is its first column's two upper patches.
    places = backbone.taps(images, [3])[0].unflatten(1, (4, 2))
    torch.testing.assert_close(quarters[:, 0], places[:, :2, 0].mean(1))


def test_the_pyramid_sums_top_down(backbone):
    config = FeatureConfig(kind="pyramid", taps=(0, 1, 2, 3), tap_norm="none")
    torch.manual_seed(1)
    pool = build_pool(TINY, config, (42, 42))
    features = pool.extract(backbone, torch.randn(2, 3, 42, 42))
    assert [tuple(x.shape) for x in features] == [(2, 16, 3, 3)] * 4
    maps = [pool.pyramid.lateral[i](features[i]) for i in range(4)]
    # 3×3 patches: strides ¼, ½, 1, 2 give 12, 6, 3 and 2 (the odd last column has its own cell).
    levels = [
        pool.pyramid.up4(maps[0]),
        pool.pyramid.up2(maps[1]),
        maps[2],
        F.max_pool2d(maps[3], 2, 2, 0, 1, True),
    ]
    assert [level.shape[-1] for level in levels] == [12, 6, 3, 2]
    for fine, coarse in ((2, 3), (1, 2), (0, 1)):
        rows = torch.arange(levels[fine].shape[-1]) // 2
        levels[fine] = levels[fine] + levels[coarse][..., rows, :][..., rows]
    wanted = torch.cat(
        [pool.pyramid.smooth[i](level).mean(dim=(2, 3)) for i, level in enumerate(levels)], 1
    )
    torch.testing.assert_close(pool(features), wanted)
    assert pool(features).shape == (2, pool.width)


def test_a_pyramid_of_three_taps_is_refused():
    with pytest.raises(UsageError, match="4 taps, 3 are named: 0, 1, 2"):
        build_pool(TINY, FeatureConfig(kind="pyramid", taps=(0, 1, 2)), (42, 42))


def test_own_norms_are_one_per_tap(backbone):
    config = FeatureConfig(kind="maps", taps=(0, 1, 3), tap_norm="own_ln")
    pool = build_pool(TINY, config, (42, 42))
    features = pool.extract(backbone, torch.randn(2, 3, 42, 42))
    tokens = backbone.taps(torch.randn(1, 3, 42, 42), [0])[0]
    assert tokens.shape == (1, 9, 16)
    for found, x in zip(pool(features), features, strict=True):
        wanted = F.layer_norm(x.permute(0, 2, 3, 1), (16,), eps=TINY.layer_norm_eps)
        torch.testing.assert_close(found, wanted.permute(0, 3, 1, 2))


def test_tokens_are_the_last_normed_map(backbone):
    pool = build_pool(TINY, FeatureConfig(kind="tokens"), (42, 42))
    images = torch.randn(2, 3, 42, 42)
    wanted = backbone(images).patch_tokens
    assert torch.equal(pool(pool.extract(backbone, images)), wanted)


@pytest.mark.parametrize(
    ("kind", "strides", "shape"),
    [
        ("pooled", (), (2, 2048)),
        ("pyramid", (4, 8, 16, 32), (2, 1024)),
        ("sfp", (32,), (2, 1024)),
        ("tokens", (32,), (2, 4, 2048)),
    ],
)
def test_a_cnn_gives_all_kinds_of_features(kind, strides, shape):
    config = CONVNETS["seresnet50"]
    pool = build_pool(config, FeatureConfig(kind=kind), (64, 64)).eval()
    net = build_convnet(config).eval()
    with torch.no_grad():
        features = pool.extract(net, torch.randn(2, 3, 64, 64))
        assert pool(features).shape == shape
    sides = [64 // stride for stride in strides]
    assert [x.shape[-1] for x in features if x.ndim == 4] == sides


def test_the_maps_of_a_cnn_are_the_three_finest():
    pool = build_pool(CONVNETS["efficientnet_b0"], FeatureConfig(kind="maps"), (70, 64))
    assert pool.taps == (4, 8, 16)
    assert pool.widths == (24, 40, 112)
    assert pool.grids == ((18, 16), (9, 8), (5, 4))


@pytest.mark.parametrize(
    ("backbone", "kind", "message"),
    [
        (CONVNETS["seresnet50"], "cls_mean", "seresnet50 has no CLS token.*Use pooled"),
        (TINY, "pooled", "tiny has no pooled map. Use cls_mean"),
    ],
)
def test_features_that_a_family_lacks(backbone, kind, message):
    with pytest.raises(UsageError, match=message):
        build_pool(backbone, FeatureConfig(kind=kind), (42, 42))


@pytest.mark.parametrize("head", get_args(HeadKind))
def test_a_head_has_features_to_read_on_every_family(head):
    for backbone in (TINY, CONVNETS["efficientnet_b0"]):
        config = choose_features(head, None, backbone)
        assert config.kind in accepted_features(head)
        build_pool(backbone, config, (42, 42))


def test_a_head_refuses_features_that_it_cannot_read():
    with pytest.raises(UsageError, match="head query cannot read cls features; accepted: tokens"):
        choose_features("query", FeatureConfig(kind="cls"), TINY)
