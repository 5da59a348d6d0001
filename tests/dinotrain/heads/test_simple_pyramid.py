"""The simple pyramid against a slow reading of its layers."""

import math

import pytest
import torch

from dinotrain.errors import UsageError
from dinotrain.heads.simple_pyramid import CNN_SCALES, VIT_SCALES, MapNorm, SimplePyramid


def slow_norm(x: torch.Tensor) -> torch.Tensor:
    mean = x.mean(dim=1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt()


def slow_double(x: torch.Tensor, layer: torch.nn.ConvTranspose2d) -> torch.Tensor:
    """Each place becomes a 2×2 of products with the four matrices of the kernel."""
    batch, _, rows, cols = x.shape
    out = x.new_zeros(batch, layer.weight.shape[1], 2 * rows, 2 * cols)
    for dy in (0, 1):
        for dx in (0, 1):
            product = torch.einsum("bihw,io->bohw", x, layer.weight[:, :, dy, dx])
            out[:, :, dy::2, dx::2] = product + layer.bias.reshape(-1, 1, 1)
    return out


def slow_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def slow_halve(x: torch.Tensor) -> torch.Tensor:
    rows = [x[:, :, i : i + 2].amax(dim=2) for i in range(0, x.shape[2], 2)]
    x = torch.stack(rows, dim=2)
    return torch.stack([x[..., i : i + 2].amax(dim=3) for i in range(0, x.shape[3], 2)], dim=3)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 7, 5, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scales", [VIT_SCALES, CNN_SCALES], ids=["vit", "cnn"])
def test_layer_by_layer(image, scales):
    torch.manual_seed(0)
    pyramid = SimplePyramid(7, scales, channels=6).eval()
    x = slow_norm(torch.einsum("oi,bihw->bohw", pyramid.reduce[0].weight[:, :, 0, 0], image))
    wanted, sizes = [], []
    for scale, resample, smooth in zip(scales, pyramid.resample, pyramid.smooth, strict=True):
        deconvolutions = [m for m in resample if isinstance(m, torch.nn.ConvTranspose2d)]
        level = slow_halve(x) if scale == 0.5 else x
        for step, layer in enumerate(deconvolutions):
            if step:
                level = slow_gelu(slow_norm(level))
            level = slow_double(level, layer)
        sizes.append(tuple(level.shape[-2:]))
        wanted.append(slow_norm(smooth[0](level)).mean(dim=(2, 3)))
    assert sizes == [(math.ceil(5 * s), math.ceil(3 * s)) for s in scales]
    found = pyramid(image)
    assert found.shape == (2, pyramid.width) == (2, 24)
    # Norms divide by deviations near 1; sums of up to 960 float32 terms.
    torch.testing.assert_close(found, torch.cat(wanted, dim=1), atol=1e-5, rtol=1e-5)


def test_it_tells_more_than_the_mean_of_the_map(image):
    """Two maps of one mean: all-linear levels would differ only by their borders."""
    torch.manual_seed(0)
    pyramid = SimplePyramid(7, channels=6).eval()
    spread = image.mean(dim=(2, 3), keepdim=True).expand_as(image)
    change = (pyramid(image) - pyramid(spread)).abs().reshape(2, 4, 6).amax(dim=(0, 2))
    assert bool((change > 0.1).all())


def test_the_norm_is_over_channels_alone(image):
    norm = MapNorm(7)
    torch.testing.assert_close(norm(image), slow_norm(image), atol=1e-6, rtol=1e-5)
    assert torch.equal(norm(image)[:, :, :1], norm(image[:, :, :1]))


@pytest.mark.parametrize(
    ("scales", "message"),
    [((4, 2, 1), "4 scales, 3 are given"), ((3, 2, 1, 0.5), "scale 3"), ((4, 2, 1, 0), "scale 0")],
)
def test_other_scales_are_refused(scales, message):
    with pytest.raises(UsageError, match=message):
        SimplePyramid(7, scales, channels=6)


@pytest.mark.parametrize("scales", [VIT_SCALES, CNN_SCALES], ids=["vit", "cnn"])
def test_it_exports(image, scales):
    torch.manual_seed(0)
    pyramid = SimplePyramid(7, scales, channels=6).eval()
    program = torch.export.export(pyramid, (image[:1],)).run_decompositions({})
    for node in program.graph.nodes:
        assert len(getattr(node.meta.get("val"), "shape", ())) <= 4
    found = program.module()(image[:1])
    torch.testing.assert_close(found, pyramid(image[:1]), atol=1e-6, rtol=1e-5)
