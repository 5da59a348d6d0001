"""LayerNorms that square nothing above 1: the same function, finite in half precision, few."""

import pytest
import torch
from torch import Tensor, nn

from dinoexport.graph.deploy_norms import ChannelNorm, SafeNorm
from dinoexport.passes.base import apply_passes
from dinoexport.passes.guard_norms import LARGEST_SQUARED, GuardNorms, large_norms
from dinoexport.passes.sequence import PASSES, build_deploy_model
from dinotrain.backbones.vit import ViTConfig

SIZE = (42, 56)
VIT = ViTConfig(
    name="small", embed_dim=48, depth=2, heads=3, ffn_dim=96, grid=(4, 4), position_rule="scale"
)
WIDTH = 384


def both(eps: float = 1e-6, affine: bool = False) -> tuple[nn.LayerNorm, SafeNorm]:
    norm = nn.LayerNorm(WIDTH, eps=eps, elementwise_affine=affine)
    return norm, SafeNorm(norm, -1)


@pytest.mark.parametrize("size", [0.0, 1e-8, 1e-4, 1e-2, 1.0, 300.0, 1e5])
@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_it_is_layer_norm_at_every_size(size, eps):
    """In float64; zeros give zeros, and where ε matters most it acts as it should."""
    norm, safe = both(eps)
    x = size * torch.randn(3, 7, WIDTH, dtype=torch.float64) + 2
    torch.testing.assert_close(safe(x), norm(x), rtol=0, atol=1e-12)


def test_it_keeps_weights():
    norm, safe = both(affine=True)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    x = 400 * torch.randn(2, 5, WIDTH)
    # Six roundings of 6e-8 on values of some units.
    torch.testing.assert_close(safe(x), norm(x), rtol=0, atol=1e-5)


def hot(size: float) -> Tensor:
    """Tokens as DINOv2's middle blocks have them: one channel far out, and a quiet token."""
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    x[:3, 7] = size
    return x


@pytest.mark.parametrize("size", [300.0, 2000.0, 30000.0])
def test_half_precision_holds_it(size):
    x = hot(size)
    norm, safe = both()
    plain = ChannelNorm(norm, -1)
    assert safe(x.half()).isfinite().all()
    gap = (safe(x.half()).float() - norm(x)).abs()
    # Values up to √384 = 20: half a unit in the last place is 0.008, and five operations round.
    assert float(gap.max()) < 0.05
    # The plain formula squares to infinity, and what is divided by it is zero.
    assert float(plain(x.half())[0].abs().max()) == 0


@pytest.mark.parametrize("x", [torch.zeros(2, WIDTH), torch.full((2, WIDTH), 7.0)])
def test_constant_tokens_give_zeros_in_half_precision(x):
    _, safe = both(eps=float(torch.tensor(1e-6).half()))
    assert torch.equal(safe(x.half()), torch.zeros(2, WIDTH).half())


# --- the pass ------------------------------------------------------------------------------------


@pytest.fixture
def loud(random_model):
    """One channel of the residual stream leaves block 0 at 400."""
    model = random_model(backbone=VIT, image_size=SIZE)
    model.backbone.blocks[0].mlp.fc2.bias[5] = 400 / float(model.backbone.blocks[0].ls2.gamma[5])
    return model


def test_what_is_large_is_found(loud, random_model, random_pixels):
    pixels = random_pixels(0, SIZE)
    quiet = build_deploy_model(random_model(backbone=VIT, image_size=SIZE))
    assert large_norms(quiet, [pixels]) == ()
    # Behind block 0: both norms of block 1 and the last one; the last one's result is small again.
    wanted = ("backbone.blocks.1.norm1", "backbone.blocks.1.norm2", "backbone.norm")
    deploy = build_deploy_model(loud)
    assert large_norms(deploy, [pixels]) == wanted
    assert not any(module._forward_pre_hooks for module in deploy.modules())


@pytest.mark.parametrize(("value", "found"), [(250.0, False), (262.0, True)])
def test_the_limit_is_what_half_precision_can_square(value, found):
    model = nn.Sequential(nn.LayerNorm(48))
    model.run = lambda x: model(x[0])  # type: ignore[method-assign,assignment]
    x = torch.zeros(1, 48)
    x[0, 0] = value
    assert LARGEST_SQUARED**2 < 65504 < (LARGEST_SQUARED + 1) ** 2
    assert large_norms(model, [(x,)]) == (("0",) if found else ())  # type: ignore[arg-type]


def test_it_preserves_the_function(loud, random_pixels):
    pixels = tuple(x.double() for x in random_pixels(0, SIZE))
    deploy = build_deploy_model(loud).double()
    wanted, wanted_taps = deploy.run(pixels)
    names = large_norms(deploy, [pixels])
    apply_passes(deploy, [GuardNorms(names)])
    assert {n for n, m in deploy.named_modules() if isinstance(m, SafeNorm)} == set(names)
    found, found_taps = deploy.run(pixels)
    for one, two in ((wanted, found), (wanted_taps, found_taps)):
        for name, value in one.items():
            # In float64: a few roundings of 1e-16 on values of up to 400.
            torch.testing.assert_close(two[name], value, rtol=0, atol=1e-10)


def test_others_are_left(loud):
    deploy = apply_passes(build_deploy_model(loud), [GuardNorms(())])
    assert not any(isinstance(m, SafeNorm) for m in deploy.modules())
    assert deploy.passes == (*(step.name for step in PASSES), "guard_norms")
