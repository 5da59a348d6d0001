"""The segmentation decoder against the text of its source, taken literally."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinotrain.errors import ShapeError, UsageError
from dinotrain.heads.segmentation import (
    ConvBlock,
    DecoderConfig,
    SegmentationDecoder,
    group_count,
)

SMALL = DecoderConfig(channels=(16, 12, 8, 8), dropout=0.1)


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def literal_block(block: ConvBlock, x: Tensor, skip: Tensor | None) -> Tensor:
    """METHODS C word by word: resize the skip to x, concatenate, 1×1, GN, GELU, 3×3, GN, GELU."""
    weight = block.reduce.weight
    if skip is not None:
        assert block.reduce_skip is not None
        skip = F.interpolate(skip, size=x.shape[-2:], mode="bilinear", align_corners=False)
        x = torch.cat([x, skip], dim=1)
        weight = torch.cat([weight, block.reduce_skip.weight], dim=1)
    x = F.conv2d(x, weight)
    x = F.group_norm(x, block.norm1.num_groups, block.norm1.weight, block.norm1.bias)
    x = F.conv2d(F.gelu(x), block.mix.weight, padding=1)
    x = F.group_norm(x, block.norm2.num_groups, block.norm2.weight, block.norm2.bias)
    return F.gelu(x)


def literal(decoder: SegmentationDecoder, taps: list[Tensor]) -> Tensor:
    shallow, mid, deep = taps
    stages = [
        (decoder.stage1, None),
        (decoder.stage2, mid),
        (decoder.stage3, shallow),
        (decoder.stage4, None),
    ]
    x = deep
    for block, skip in stages:
        x = literal_block(block, x, skip)
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    x = F.conv2d(x, decoder.classify.weight, decoder.classify.bias)
    return F.interpolate(x, size=decoder.image_size, mode="bilinear", align_corners=False)


def taps_for(widths, sizes, batch=2) -> list[Tensor]:
    return [torch.randn(batch, w, *s) for w, s in zip(widths, sizes, strict=True)]


def test_parameters_on_vit_b_with_four_classes():
    decoder = SegmentationDecoder((768,) * 3, (37, 37), (518, 518), 4)
    blocks = [count(b) for b in (decoder.stage1, decoder.stage2, decoder.stage3, decoder.stage4)]
    assert blocks == [787_456, 279_040, 94_464, 41_216]
    assert count(decoder.classify) == 260
    assert count(decoder) == 1_202_436


@pytest.mark.parametrize(
    ("widths", "sizes", "image_size"),
    [
        ((24,) * 3, [(5, 4)] * 3, (70, 56)),
        ((24,) * 3, [(4, 4)] * 3, (64, 64)),  # the last resize has nothing to do
        ((6, 10, 24), [(12, 8), (6, 4), (3, 2)], (96, 64)),  # a convnet's taps
    ],
    ids=["vit", "exact", "convnet"],
)
def test_is_the_source_taken_literally(widths, sizes, image_size):
    decoder = SegmentationDecoder(widths, sizes[2], image_size, 3, SMALL).double().eval()
    taps = [tap.double() for tap in taps_for(widths, sizes)]
    found = decoder({"image": taps})
    assert found.shape == (2, 3, *image_size)
    # Both are float64; they differ in the order of sums only.
    torch.testing.assert_close(found, literal(decoder, taps), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fault", ["swapped taps", "skip scaled", "eps", "gelu"])
def test_a_fault_is_seen_by_that_comparison(fault, monkeypatch):
    decoder = SegmentationDecoder((8,) * 3, (3, 3), (42, 42), 3, SMALL).double().eval()
    taps = [tap.double() for tap in taps_for((8,) * 3, [(3, 3)] * 3)]
    wanted = literal(decoder, taps)
    if fault == "swapped taps":
        taps = [taps[1], taps[0], taps[2]]
    elif fault == "skip scaled":
        decoder.stage3.reduce_skip.weight.data *= 1.001
    elif fault == "eps":
        decoder.stage2.norm1.eps = 1e-4
    else:
        exact = F.gelu
        monkeypatch.setattr(F, "gelu", lambda x: exact(x, approximate="tanh"))
    assert (decoder({"image": taps}) - wanted).abs().max() > 1e-7


def test_initial_weights_are_kaiming_normal_over_all_inputs():
    block = ConvBlock(256, 128, 0.0, skip_width=768)
    whole = torch.cat([block.reduce.weight, block.reduce_skip.weight], dim=1)
    # 131072 draws: the standard deviation is known to 1/√(2·131072) = 0.2 %.
    assert whole.std().item() == pytest.approx(math.sqrt(2 / 1024), rel=0.01)
    assert block.reduce_skip.weight.std().item() == pytest.approx(math.sqrt(2 / 1024), rel=0.01)
    assert block.mix.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.01)
    decoder = SegmentationDecoder((8,) * 3, (2, 2), (28, 28), 2)
    assert not decoder.classify.bias.any()


def test_dropout_drops_whole_channels_in_training_only():
    block = ConvBlock(8, 64, 0.5)
    x = torch.randn(4, 8, 6, 6)
    dropped = (block.train()(x, None, (6, 6)) == 0).flatten(2)
    whole = dropped.all(dim=2)
    assert 0.3 < whole.float().mean() < 0.7
    assert torch.equal(dropped.any(dim=2), whole)
    assert torch.equal(block.eval()(x, None, (6, 6)), block(x, None, (6, 6)))


@pytest.mark.parametrize(
    ("channels", "groups"), [(256, 32), (64, 32), (48, 24), (24, 24), (37, 1), (66, 22), (1, 1)]
)
def test_groups_are_the_largest_divisor_up_to_32(channels, groups):
    assert group_count(channels) == groups


def test_export_gives_the_same_numbers_for_any_batch():
    decoder = SegmentationDecoder((24,) * 3, (5, 4), (70, 56), 3, SMALL).eval()
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(
        decoder,
        ({"image": taps_for((24,) * 3, [(5, 4)] * 3)},),
        dynamic_shapes=({"image": [{0: batch}] * 3},),
    ).run_decompositions({})
    for nodes in program.graph.nodes:
        value = nodes.meta.get("val")
        assert not isinstance(value, Tensor) or value.ndim <= 4
    taps = taps_for((24,) * 3, [(5, 4)] * 3, batch=3)
    # The same float32 kernels in the same order, but for how a normalisation is taken apart.
    torch.testing.assert_close(
        program.module()({"image": taps}), decoder({"image": taps}), rtol=1e-5, atol=1e-5
    )


def test_learns_to_copy_a_map():
    """A gradient reaches every parameter, and a few steps fit what the taps plainly show."""
    decoder = SegmentationDecoder((4,) * 3, (4, 4), (56, 56), 2, SMALL)
    taps = taps_for((4,) * 3, [(4, 4)] * 3, batch=8)
    wanted = (F.interpolate(taps[2][:, :1], size=(56, 56), mode="bilinear")[:, 0] > 0).long()
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    for _ in range(60):
        loss = F.cross_entropy(decoder({"image": taps}), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in decoder.parameters())
    right = (decoder.eval()({"image": taps}).argmax(dim=1) == wanted).float().mean()
    # The majority class alone gives about a half.
    assert right > 0.9


def test_state_survives_a_copy():
    decoder = SegmentationDecoder((4,) * 3, (2, 2), (28, 28), 2, SMALL).eval()
    other = SegmentationDecoder((4,) * 3, (2, 2), (28, 28), 2, SMALL).eval()
    taps = taps_for((4,) * 3, [(2, 2)] * 3)
    assert not torch.equal(other({"image": taps}), decoder({"image": taps}))
    other.load_state_dict(copy.deepcopy(decoder.state_dict()))
    assert torch.equal(other({"image": taps}), decoder({"image": taps}))


def test_refusals():
    with pytest.raises(UsageError, match="reads 3 taps, 2 are named"):
        SegmentationDecoder((8, 8), (2, 2), (28, 28), 2)
    with pytest.raises(UsageError, match="at least 2"):
        SegmentationDecoder((8,) * 3, (2, 2), (28, 28), 1)
    decoder = SegmentationDecoder((8,) * 3, (2, 2), (28, 28), 2)
    with pytest.raises(ShapeError, match=r"built for taps of \(8, 8, 8\)"):
        decoder({"image": taps_for((8, 8, 9), [(2, 2)] * 3)})
    with pytest.raises(ShapeError, match="the deepest 2×2"):
        decoder({"image": taps_for((8,) * 3, [(3, 3)] * 3)})
    with pytest.raises(ShapeError):
        decoder({"image": taps_for((8, 8), [(2, 2)] * 2)})
