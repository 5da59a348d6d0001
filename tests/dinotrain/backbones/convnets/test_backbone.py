"""What every convolutional backbone does, held against the published tables."""

import hashlib
from itertools import pairwise

import msgspec
import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from dinotrain.backbones.convnets.backbone import (
    ConvNet,
    check_image_size,
    estimate_statistics_,
    init_weights_,
)
from dinotrain.backbones.convnets.config import CONVNETS, TAP_STRIDES, ConvNetConfig
from dinotrain.backbones.convnets.layers import BatchNorm, SameConv2d, conv2d, same_padding
from dinotrain.backbones.convnets.table import build_convnet, expected_shapes
from dinotrain.errors import ShapeError, UsageError

CLASSES = 1000

PUBLISHED = {
    # name: (parameters with a classifier of 1000, taps at 4/8/16/32, pooled, native pixels).
    # METHODS G; the counts are those of timm 1.0.31's models.
    "seresnet50": (28_088_024, (256, 512, 1024, 2048), 2048, 224),
    "efficientnet_b0": (5_288_548, (24, 40, 112, 320), 1280, 224),
    "efficientnet_b1": (7_794_184, (24, 40, 112, 320), 1280, 240),
    "efficientnet_b2": (9_109_994, (24, 48, 120, 352), 1408, 260),
    "efficientnet_b3": (12_233_232, (32, 48, 136, 384), 1536, 300),
    "efficientnet_b4": (19_341_616, (32, 56, 160, 448), 1792, 380),
    "efficientnet_b5": (30_389_784, (40, 64, 176, 512), 2048, 456),
    "efficientnet_b6": (43_040_704, (40, 72, 200, 576), 2304, 528),
    "efficientnet_b7": (66_347_960, (48, 80, 224, 640), 2560, 600),
}

TIMM_KEYS = {
    # sha256 over the sorted "key shape" lines of timm 1.0.31's own models, without classifier and
    # num_batches_tracked, and their number: its files are loaded without renaming.
    "seresnet50": ("eb37c9e713ccc6f7", 329),
    "efficientnet_b0": ("450a546895f2cf63", 309),
    "efficientnet_b1": ("8ec4e4c2784a9681", 437),
    "efficientnet_b2": ("6671158183656c70", 437),
    "efficientnet_b3": ("a7273187d7786652", 494),
    "efficientnet_b4": ("4d207c0acd9871f3", 608),
    "efficientnet_b5": ("65bbde9e76954a43", 736),
    "efficientnet_b6": ("3bb9494eb058667f", 850),
    "efficientnet_b7": ("b2330172cb871165", 1035),
}


def plain(name: str) -> str:
    return name.removeprefix("tf_")


def test_both_forms_of_every_scale_are_there():
    wanted = {"seresnet50", *(f"{form}efficientnet_b{n}" for form in ("", "tf_") for n in range(8))}

    assert CONVNETS.keys() == wanted


@pytest.mark.parametrize("name", list(CONVNETS))
def test_architecture_has_the_published_sizes(name):
    parameters, taps, pooled, native = PUBLISHED[plain(name)]
    config = CONVNETS[name]
    with torch.device("meta"):
        model = build_convnet(config)
    classifier = (config.pooled_width + 1) * CLASSES

    assert sum(value.numel() for value in model.parameters()) + classifier == parameters
    assert tuple(config.tap_channels) == TAP_STRIDES
    assert tuple(config.tap_channels.values()) == taps
    assert config.pooled_width == pooled
    assert config.native_size == native
    assert config.name == name


@pytest.mark.parametrize("name", list(CONVNETS))
def test_keys_are_timms(name):
    shapes = expected_shapes(CONVNETS[name])
    lines = sorted(f"{key} {shape}" for key, shape in shapes.items())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()

    assert (digest[:16], len(lines)) == TIMM_KEYS[plain(name)]


def test_the_tensorflow_form_differs_in_padding_and_epsilon_alone():
    for number in range(8):
        one, other = CONVNETS[f"efficientnet_b{number}"], CONVNETS[f"tf_efficientnet_b{number}"]
        changed = msgspec.structs.replace(one, name=other.name, padding="same", norm_eps=1e-3)

        assert changed == other
        assert one.norm_eps == 1e-5


def test_config_survives_a_header(small):
    config = msgspec.json.decode(msgspec.json.encode(small), type=ConvNetConfig)

    assert config == small
    assert config.stages == small.stages


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"width": 0.0}, "width multiplier 0.0"),
        ({"width": float("nan")}, "width multiplier nan"),
        ({"depth": 1e9}, "depth multiplier 1000000000.0"),
        ({"norm_eps": 0.0}, "norm_eps 0.0"),
        ({"padding": "same"}, "SE-ResNet pads symmetrically"),
    ],
)
def test_config_that_no_model_has_is_refused(change, complaint):
    with pytest.raises(UsageError, match=complaint):
        ConvNetConfig(**({"name": "odd", "family": "seresnet"} | change))


# Taps


@pytest.mark.parametrize("size", [(64, 64), (96, 33), (61, 100)], ids=str)
def test_taps_have_the_stated_shapes(small, randomised, size):
    model = randomised(small)
    images = torch.randn(2, 3, *size)
    out, taps = model.forward_taps(images)
    height, width = size

    for stride, tap in zip(TAP_STRIDES, taps, strict=True):
        assert model.grid_for(height, width, stride) == tap.shape[2:]
        assert tap.shape[2:] == (-(-height // stride), -(-width // stride))
        assert tap.shape[1] == small.tap_channels[stride]
    assert out.features.shape == (2, small.pooled_width, *model.grid_for(height, width))
    assert out.pooled.shape == (2, small.pooled_width)
    assert torch.equal(out.pooled, out.features.mean((2, 3)))


def test_taps_alone_are_the_same_and_stop_where_they_can(small, randomised):
    model = randomised(small)
    images = torch.randn(1, 3, 64, 64)
    _, wanted = model.forward_taps(images, (32, 4, 16, 8))
    ran: list[int] = []
    for number, stage in enumerate(model.stage_modules()):
        stage.register_forward_hook(lambda *_, number=number: ran.append(number))

    for found, tap in zip(model.taps(images, (32, 4, 16, 8)), wanted, strict=True):
        assert torch.equal(found, tap)
    ran.clear()
    model.taps(images, (8, 4))
    assert ran == list(range(small.tap_stages[8] + 1))
    ran.clear()
    assert model.taps(images, ()) == []
    assert ran == []
    assert torch.equal(model(images).pooled, model.forward_taps(images)[0].pooled)


def test_unknown_stride_is_refused(small, randomised):
    model = randomised(small)

    for call in (model.taps, model.forward_taps):
        with pytest.raises(UsageError, match=r"no tap at stride 2\. Known: 4, 8, 16, 32"):
            call(torch.zeros(1, 3, 64, 64), (4, 2))


def test_small_image_is_refused(small, randomised):
    with pytest.raises(ShapeError, match="image size 31 is under 32"):
        randomised(small)(torch.zeros(1, 3, 64, 31))
    with pytest.raises(ShapeError, match="image size 16"):
        check_image_size(16)
    check_image_size(None)
    check_image_size((32, 260))


# Statistics


def statistics(model: ConvNet) -> torch.Tensor:
    return torch.cat([value.flatten().clone() for value in model.buffers()])


def test_statistics_are_frozen_in_training(small, randomised):
    model = randomised(small)
    images = 3 + 2 * torch.randn(4, 3, 64, 64)
    before, wanted = statistics(model), model(images).pooled
    model.train()

    assert all(module.training for module in model.modules())
    assert torch.equal(model(images).pooled, wanted)
    assert torch.equal(statistics(model), before)


def test_live_statistics_follow_the_data_in_training_only(small, randomised):
    model = randomised(small)
    images = 3 + 2 * torch.randn(4, 3, 64, 64)
    before, frozen = statistics(model), model(images).pooled
    model.set_live_statistics_(True)

    assert torch.equal(model(images).pooled, frozen), "evaluation reads the stored ones"
    model.train()
    assert not torch.equal(model(images).pooled, frozen)
    assert not torch.equal(statistics(model), before)
    after = statistics(model)
    model.set_live_statistics_(False)
    model(images)
    assert torch.equal(statistics(model), after)


@pytest.mark.parametrize("mode", ["stored", "live"])
def test_batch_norm_equals_torchs(mode):
    theirs, ours = nn.BatchNorm2d(6, eps=1e-3), BatchNorm(6, eps=1e-3)
    with torch.no_grad():
        for value in theirs.state_dict().values():
            if value.is_floating_point():
                value.copy_(0.5 + torch.rand(6))
    state = {k: v.clone() for k, v in theirs.state_dict().items() if "num_batches" not in k}
    ours.load_state_dict(state)
    ours.live = True
    theirs.train(mode == "live")
    ours.train(mode == "live")
    x = torch.randn(3, 6, 5, 4)

    assert torch.equal(ours(x), theirs(x))
    for key, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key])


def test_gradients_reach_every_parameter_with_frozen_statistics(small, randomised):
    model = randomised(small).requires_grad_(True).train()
    out, taps = model.forward_taps(torch.randn(2, 3, 64, 64))
    (out.pooled.sum() + sum(tap.square().sum() for tap in taps)).backward()

    assert all(value.grad is not None and value.grad.any() for value in model.parameters())


def test_estimated_statistics_are_those_of_the_batch(small, randomised):
    model = randomised(small)
    images = 5 + torch.randn(4, 3, 64, 64)
    seen: list[torch.Tensor] = []
    first = next(module for module in model.modules() if isinstance(module, BatchNorm))
    first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    estimate_statistics_(model, images)

    channels = seen[0].transpose(0, 1).flatten(1)
    assert torch.allclose(first.running_mean, channels.mean(1), atol=1e-5)
    assert torch.allclose(first.running_var, channels.var(1), rtol=1e-4)
    assert not model.training
    assert all(m.momentum == 0.1 and not m.live for m in model.modules() if hasattr(m, "live"))


def test_fresh_weights_keep_maps_alive(small):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = init_weights_(build_convnet(small)).eval()
        again = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        out, taps = model.forward_taps(again)

    for value in (*taps, out.pooled):
        assert 0.05 < float(value.std()) < 50


# Padding


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [(8, 8), (9, 7), (10, 13), (1, 2)], ids=str)
def test_same_padding_equals_onnxs(kernel, size):
    # SAME_UPPER is TensorFlow's rule by ONNX's definition: the odd pixel goes to the end.
    conv = conv2d(4, 4, kernel, stride=2, groups=4, padding="same")
    assert isinstance(conv, SameConv2d)
    images = torch.randn(2, 4, *size)
    node = helper.make_node(
        "Conv", ["x", "w"], ["y"], strides=[2, 2], group=4, auto_pad="SAME_UPPER"
    )
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "same",
        [
            value("x", TensorProto.FLOAT, images.shape),
            value("w", TensorProto.FLOAT, conv.weight.shape),
        ],
        [value("y", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (wanted,) = session.run(None, {"x": images.numpy(), "w": conv.weight.detach().numpy()})

    np.testing.assert_allclose(conv(images).detach().numpy(), wanted, atol=1e-6)


def test_same_padding_by_hand():
    assert same_padding(224, 3, 2) == (0, 1)
    assert same_padding(225, 3, 2) == (1, 1)
    assert same_padding(112, 5, 2) == (1, 2)
    assert same_padding(7, 5, 1) == (2, 2)


# Depths


def test_depths_count_from_the_stem_to_the_projection(small):
    model = build_convnet(small)
    depths = model.parameter_depths()
    blocks = sum(stage.blocks for stage in small.stages)
    names = list(depths)
    efficient = small.family == "efficientnet"

    assert names == [name for name, _ in model.named_parameters()]
    # Parameters stand in the order in which images meet them.
    assert all(before <= after for before, after in pairwise(depths.values()))
    assert set(depths.values()) == set(range(blocks + (2 if efficient else 1)))
    stem = [name for name, depth in depths.items() if depth == 0]
    assert stem == (
        ["conv_stem.weight", "bn1.weight", "bn1.bias"]
        if efficient
        else ["conv1.weight", "bn1.weight", "bn1.bias"]
    )
    if efficient:
        last = [name for name, depth in depths.items() if depth == blocks + 1]
        assert last == ["conv_head.weight", "bn2.weight", "bn2.bias"]
