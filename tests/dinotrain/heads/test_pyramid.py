"""The lateral pyramid over a CNN's maps, and what both pyramids share, against slow readings."""

import pytest
import torch

from dinotrain.errors import ShapeError, UsageError
from dinotrain.heads.pyramid import LateralPyramid, halve, pool_levels, top_down

CHANNELS = (3, 5, 8, 13)
SIZES = ((25, 18), (13, 9), (7, 5), (4, 3))
"""Of the taps of an image of 100 × 72, rounded up at each halving."""


def cnn_maps(batch: int = 2) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, width, *size, generator=draw)
        for width, size in zip(CHANNELS, SIZES, strict=True)
    ]


@pytest.fixture
def pyramid() -> LateralPyramid:
    torch.manual_seed(0)
    return LateralPyramid(CHANNELS, one_scale=False, channels=6).eval()


def slow_top_down(levels: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each place adds what every coarser level holds where it lies."""
    sums = []
    for fine, level in enumerate(levels):
        rows, cols = (torch.arange(n) for n in level.shape[-2:])
        total = level.clone()
        for step, coarse in enumerate(levels[fine + 1 :], start=1):
            total += coarse[:, :, rows // 2**step][:, :, :, cols // 2**step]
        sums.append(total)
    return sums


def test_the_maps_of_a_cnn_are_taken_as_they_are(pyramid):
    maps = cnn_maps()
    # A 1×1 convolution is a matrix product at each place.
    levels = [
        torch.einsum("oi,bihw->bohw", layer.weight[:, :, 0, 0], x) + layer.bias.reshape(-1, 1, 1)
        for layer, x in zip(pyramid.lateral, maps, strict=True)
    ]
    smoothed = [
        layer(level) for layer, level in zip(pyramid.smooth, slow_top_down(levels), strict=True)
    ]
    wanted = torch.cat([x.flatten(2).sum(dim=2) / x[0, 0].numel() for x in smoothed], dim=1)
    found = pyramid(maps)
    assert found.shape == (2, pyramid.width) == (2, 24)
    # Sums of up to 450 float32 terms near 1.
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_every_map_is_read(pyramid):
    maps = cnn_maps()
    before = pyramid(maps)
    for index in range(4):
        changed = [x + 1 if i == index else x for i, x in enumerate(maps)]
        moved = (pyramid(changed) - before).abs().amax(dim=0).reshape(4, 6).amax(dim=1) > 1e-4
        # Top-down: a map reaches its own level and the finer ones.
        assert moved.tolist() == [level <= index for level in range(4)]


def test_top_down_adds_every_coarser_level():
    levels = [x[:, :3] for x in cnn_maps()]
    for found, wanted in zip(top_down(levels), slow_top_down(levels), strict=True):
        torch.testing.assert_close(found, wanted)


def test_maps_in_the_wrong_order_are_refused(pyramid):
    maps = cnn_maps()
    torch.manual_seed(0)
    reverse = LateralPyramid(CHANNELS[::-1], one_scale=False, channels=6)
    with pytest.raises(ShapeError, match="level 3 is 25×18 and the one before it 13×9"):
        reverse(maps[::-1])
    maps[3] = maps[3][:, :, :3]
    with pytest.raises(ShapeError, match="level 3 is 3×3"):
        pyramid(maps)


def test_another_number_of_maps_is_refused():
    with pytest.raises(UsageError, match="4 maps, 3 are given"):
        LateralPyramid(CHANNELS[:3], one_scale=False)


def test_halving_keeps_an_odd_last_row():
    x = torch.arange(15.0).reshape(1, 1, 3, 5)
    assert halve(x)[0, 0].tolist() == [[6, 8, 9], [11, 13, 14]]


def test_levels_are_averaged_each_on_its_own():
    levels = [torch.full((1, 2, 4, 4), 3.0), torch.full((1, 1, 2, 2), 5.0)]
    found = pool_levels(levels, [torch.nn.Identity(), torch.nn.ReLU()])
    assert found.tolist() == [[3.0, 3.0, 5.0]]


@pytest.mark.parametrize("source", ["vit", "cnn"])
def test_the_pyramid_exports(source):
    torch.manual_seed(0)
    if source == "cnn":
        model, maps = LateralPyramid(CHANNELS, one_scale=False, channels=6), cnn_maps(1)
    else:
        model = LateralPyramid([5] * 4, one_scale=True, channels=6)
        maps = [torch.randn(1, 5, 5, 3) for _ in range(4)]
    program = torch.export.export(model.eval(), (maps,)).run_decompositions({})
    torch.testing.assert_close(program.module()(maps), model(maps), atol=1e-6, rtol=1e-5)
