"""Each pass preserves the function; the runner refuses a wrong order and names what it refuses."""

from dataclasses import dataclass
from typing import final

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from dinoexport.errors import PassError
from dinoexport.graph.deploy_blocks import PlainAttention, SplitAttention
from dinoexport.graph.deploy_model import DeployModel
from dinoexport.passes.base import Pass, apply_passes
from dinoexport.passes.cut_last_block import CutLastBlock
from dinoexport.passes.facts import QKV_SPLIT, TOKEN_ROWS
from dinoexport.passes.fold_layer_norms import FoldLayerNorms
from dinoexport.passes.sequence import PASSES, build_deploy_model
from dinotrain.backbones.convnets.config import ConvNetConfig
from dinotrain.backbones.vit import ViTConfig, swiglu_hidden_dim
from dinotrain.heads.branch import HeadConfig
from dinotrain.heads.pool import FeatureConfig
from dinotrain.heads.query import QueryConfig

SIZE = (42, 56)
VIT = ViTConfig(
    name="small", embed_dim=48, depth=3, heads=3, ffn_dim=96, grid=(4, 4), position_rule="scale"
)
REGISTERS = replace(VIT, registers=4, position_rule="size_antialias")
SWIGLU = replace(REGISTERS, ffn="swiglu", ffn_dim=swiglu_hidden_dim(48))
CNN = ConvNetConfig(name="tiny", family="seresnet", width=0.125, depth=0.1)
CASES = {
    "cls": {"backbone": VIT, "features": FeatureConfig(kind="cls")},
    "registers-swiglu": {"backbone": SWIGLU},
    "maps-of-two-blocks": {
        "backbone": REGISTERS,
        "features": FeatureConfig(kind="pyramid", taps=(0, 1, 0, 1)),
    },
    "query": {
        "backbone": VIT,
        "features": FeatureConfig(kind="tokens"),
        "head": HeadConfig(kind="query", query=QueryConfig(dim=16, heads=2, hidden=24)),
    },
}


@pytest.fixture(scope="module", params=CASES)
def case(request, random_model, random_pixels) -> tuple:
    """A trained model, pixels, and what it gives in float64."""
    model = random_model(**{"image_size": SIZE} | CASES[request.param])
    pixels = random_pixels(0, SIZE)
    return model, pixels


def gap(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    return max(float((found[n] - wanted[n]).abs().max() / wanted[n].abs().max()) for n in wanted)


@pytest.mark.parametrize("count", range(1, len(PASSES) + 1), ids=lambda n: PASSES[n - 1].name)
def test_each_pass_preserves_the_function(case, count):
    """In float64, where nothing but the algebra can err."""
    model, pixels = case
    wide = tuple(x.double() for x in pixels)
    deploy = DeployModel(model).double()
    before, taps_before = apply_passes(deploy, PASSES[: count - 1]).run(wide)
    after, taps_after = apply_passes(deploy, PASSES[count - 1 : count]).run(wide)
    # Normalisation is divided by 255 in float64; a few hundred roundings of 1e-16 on each path,
    # enlarged by the decoder's sigmoids.
    assert gap(after, before) < 1e-10
    there = {n: taps_before[n][:, : v.shape[1]] for n, v in taps_after.items()}
    assert gap(taps_after, there) < 1e-10


def test_each_pass_does_something(random_model):
    """Of one of the cases at least, or its test above shows nothing."""
    changed: set[str] = set()
    for case in [*CASES.values(), {"backbone": CNN, "features": FeatureConfig(kind="pooled")}]:
        deploy = DeployModel(random_model(**{"image_size": SIZE} | case))
        for step in PASSES:
            before = describe(deploy)
            apply_passes(deploy, [step])
            if describe(deploy) != before:
                changed.add(step.name)
    assert changed == {step.name for step in PASSES}


def describe(deploy: DeployModel) -> tuple:
    state = tuple((n, float(v.double().sum())) for n, v in deploy.state_dict().items())
    kinds = tuple(type(m).__name__ for m in deploy.modules())
    return (
        state,
        kinds,
        tuple(b.rows for b in deploy.blocks),
        getattr(deploy.backbone, "deepest", 0),
    )


def test_a_convnet(random_model, random_pixels):
    model = random_model(
        backbone=CNN, features=FeatureConfig(kind="pooled"), image_size=(64, 64)
    ).double()
    pixels = tuple(x.double() for x in random_pixels(0, (64, 64)))
    wanted, _ = DeployModel(model).run(pixels)
    found, _ = build_deploy_model(model).run(pixels)
    assert gap(found, wanted) < 1e-10


# --- the runner ----------------------------------------------------------------------------------


@pytest.fixture
def deploy(random_model) -> DeployModel:
    return DeployModel(random_model(backbone=VIT, image_size=SIZE))


@pytest.mark.parametrize(
    "step", [p for p in PASSES if p.requires - {TOKEN_ROWS}], ids=lambda p: p.name
)
def test_a_missing_requirement_is_refused_by_name(deploy, step):
    first = PASSES[: PASSES.index(step)]
    head = [p for p in first if not (p.requires - {TOKEN_ROWS} or p.ensures & step.requires)]
    apply_passes(deploy, head)
    with pytest.raises(PassError) as caught:
        apply_passes(deploy, [step])
    text = str(caught.value)
    assert text.startswith(f"pass {step.name} requires that ")
    assert any(fact in text for fact in step.requires)
    assert f"passes run before it: {', '.join(p.name for p in head)}." in text
    assert "\n" not in text


def test_the_first_pass_says_that_none_ran(deploy):
    with pytest.raises(PassError, match="passes run before it: none") as caught:
        apply_passes(deploy, [FoldLayerNorms()])
    assert QKV_SPLIT in str(caught.value)


@final
@dataclass(frozen=True)
class Fails(Pass):
    name = "fails"

    def apply(self, model: DeployModel) -> None:
        raise KeyError("blocks")


@final
@dataclass(frozen=True)
class Turns(Pass):
    name = "turns"
    breaks = frozenset({TOKEN_ROWS})

    def apply(self, model: DeployModel) -> None: ...


def test_a_pass_that_fails_is_named(deploy):
    with pytest.raises(PassError, match=r"pass fails failed: 'blocks'; passes run before it: cut_"):
        apply_passes(deploy, [PASSES[0], Fails()])


def test_a_fact_that_was_broken_does_not_hold(deploy):
    with pytest.raises(PassError, match="pass split_qkv requires that tokens are rows"):
        apply_passes(deploy, [Turns(), PASSES[4]])


def test_names_and_facts_are_each_one_passes(deploy):
    names = [step.name for step in PASSES]
    ensured = [fact for step in PASSES for fact in step.ensures]
    assert len(set(names)) == len(names)
    assert len(set(ensured)) == len(ensured)
    apply_passes(deploy, PASSES)
    assert deploy.passes == tuple(names)
    assert deploy.facts == {TOKEN_ROWS, *ensured}
    assert all(
        step.__doc__ and "Before" in step.__doc__ and "After" in step.__doc__ for step in PASSES
    )


# --- what single passes leave --------------------------------------------------------------------


def test_layers_keep_their_names(random_model):
    deploy = build_deploy_model(random_model(backbone=VIT, image_size=SIZE))
    names = {n for n, m in deploy.named_modules() if isinstance(m, torch.nn.Linear)}
    block = {f"backbone.blocks.2.{n}" for n in ("attn.q", "attn.k", "attn.v", "attn.proj")}
    assert block | {"backbone.blocks.2.mlp.fc1", "backbone.blocks.2.mlp.fc2"} <= names
    assert not any("qkv" in name for name in names)


def test_attention_is_plain_and_its_scale_is_gone(random_model):
    deploy = build_deploy_model(random_model(backbone=VIT, image_size=SIZE))
    for block in deploy.blocks:
        assert type(block.attn) is PlainAttention
        assert block.attn.scale == 1


def test_split_layers_share_nothing_with_the_trained_model(random_model):
    model = random_model(backbone=VIT, image_size=SIZE)
    split = SplitAttention(model.backbone.blocks[0].attn)
    before = model.backbone.blocks[0].attn.qkv.weight.clone()
    split.q.weight.fill_(3.0)
    split.proj.weight.fill_(3.0)
    assert torch.equal(model.backbone.blocks[0].attn.qkv.weight, before)
    assert split.k.weight.equal(before[48:96])


@pytest.mark.parametrize(
    ("kind", "rows"),
    [("cls", 1), ("cls4", 1), ("cls_mean", None), ("cls_quarters", None), ("pyramid", None)],
)
def test_the_last_block_is_cut_where_cls_alone_is_read(random_model, random_pixels, kind, rows):
    backbone = replace(REGISTERS, depth=4)
    model = random_model(backbone=backbone, features=FeatureConfig(kind=kind), image_size=SIZE)
    deploy = build_deploy_model(model)
    assert [block.rows for block in deploy.blocks] == [None, None, None, rows]
    _, taps = deploy.run(random_pixels(1, SIZE))
    tokens = 17 if rows is None else rows
    assert taps["blocks.3.attn"].shape == taps["blocks.3.mlp"].shape == (3, tokens, 48)
    assert taps["blocks.2.mlp"].shape == (3, 17, 48)


def test_a_block_cut_by_mistake_shows(random_model, random_pixels):
    """The mean over patches would be over none."""
    model = random_model(backbone=VIT, image_size=SIZE)
    deploy = build_deploy_model(model)
    model.pool.reads_cls_only = deploy.pool.reads_cls_only = True
    CutLastBlock().apply(deploy)
    pixels = random_pixels(1, SIZE)
    assert not all(bool(v.isfinite().all()) for v in deploy.run(pixels)[0].values())
