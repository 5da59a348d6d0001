"""EfficientNet against transformers' own, with the same random weights in both."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import EfficientNetConfig, EfficientNetModel

from dinotrain.backbones.convnets.config import CONVNETS
from dinotrain.backbones.convnets.efficientnet import EfficientNet, SqueezeExcite
from dinotrain.backbones.convnets.layers import BatchNorm, SameConv2d

# Relative to a map's spread, both sides in float64 so that rounding does not hide a difference:
# 2e-15 was measured. Every planted fault below makes 1 and more.
TOLERANCE = 1e-10

SIZES = [(96, 96), (128, 64)]
"""Even at every stride: there transformers pads as TensorFlow does."""

BLOCK_PARTS = {
    "expansion.expand_conv": "conv_pw",
    "expansion.expand_bn": "bn1",
    "depthwise_conv.depthwise_conv": "conv_dw",
    "depthwise_conv.depthwise_norm": "bn2",
    "squeeze_excite.reduce": "se.conv_reduce",
    "squeeze_excite.expand": "se.conv_expand",
    "projection.project_conv": "conv_pwl",
    "projection.project_bn": "bn3",
}
FIRST_STAGE_PARTS = {
    "depthwise_conv.depthwise_conv": "conv_dw",
    "depthwise_conv.depthwise_norm": "bn1",
    "squeeze_excite.reduce": "se.conv_reduce",
    "squeeze_excite.expand": "se.conv_expand",
    "projection.project_conv": "conv_pw",
    "projection.project_bn": "bn2",
}
WHOLE = {
    "embeddings.convolution": "conv_stem",
    "embeddings.batchnorm": "bn1",
    "encoder.top_conv": "conv_head",
    "encoder.top_bn": "bn2",
}


def theirs_of(ours: EfficientNet) -> EfficientNetModel:
    """Make transformers' model of the same architecture and weights."""
    config = ours.config
    stages = [stage.blocks for stage in config.stages]
    symmetric = config.padding == "symmetric"
    theirs = EfficientNetModel(
        EfficientNetConfig(
            width_coefficient=config.width,
            depth_coefficient=config.depth,
            hidden_dim=config.pooled_width,
            batch_norm_eps=config.norm_eps,
            depthwise_padding=list(range(sum(stages))) if symmetric else [],
        )
    )
    if symmetric:
        theirs.embeddings.padding = nn.ZeroPad2d(1)
    names = dict(WHOLE)
    places = [(stage, index) for stage, count in enumerate(stages) for index in range(count)]
    for number, (stage, index) in enumerate(places):
        for part, name in (FIRST_STAGE_PARTS if stage == 0 else BLOCK_PARTS).items():
            names[f"encoder.blocks.{number}.{part}"] = f"blocks.{stage}.{index}.{name}"
    state = ours.state_dict()
    renamed = {}
    for key in theirs.state_dict():
        module, kind = key.rsplit(".", 1)
        if kind != "num_batches_tracked":
            renamed[key] = state.pop(f"{names[module]}.{kind}")
    assert not state, "every tensor of ours has its place in theirs"
    # Into float64 first: a float32 model would round the weights.
    theirs.double().load_state_dict(renamed, strict=False)
    return theirs.eval()


def pixels(size: tuple[int, int]) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(5)).double()


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max() / other.std())


def gaps(ours: EfficientNet, theirs: EfficientNetModel, size: tuple[int, int]) -> list[float]:
    """Compare features, pooled output and the four taps."""
    images = pixels(size)
    with torch.no_grad():
        wanted = theirs(images, output_hidden_states=True)
        found, taps = ours.forward_taps(images)
    ends = [0]
    for stage in ours.config.stages:
        ends.append(ends[-1] + stage.blocks)
    # hidden_states[0] is the image, so that number k is after block k − 1.
    hidden = [wanted.hidden_states[ends[stage + 1]] for stage in (1, 2, 4, 6)]
    pairs = [
        (found.features, wanted.last_hidden_state),
        (found.pooled, wanted.pooler_output),
        *zip(taps, hidden, strict=True),
    ]
    assert all(float(other.std()) > 0.05 for _, other in pairs), "dead maps agree with anything"
    return [gap(one, other) for one, other in pairs]


@pytest.mark.parametrize(
    "name", ["efficientnet_b0", "tf_efficientnet_b0", "efficientnet_b2", "tf_efficientnet_b3"]
)
def test_equals_transformers(name, randomised):
    ours = randomised(CONVNETS[name]).double()
    theirs = theirs_of(ours)
    for size in SIZES:
        assert max(gaps(ours, theirs, size)) <= TOLERANCE, size


def other_epsilon(model: EfficientNet) -> None:
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.eps = 1e-5


def symmetric_padding(model: EfficientNet) -> None:
    for module in model.modules():
        if isinstance(module, SameConv2d):
            half = module.kernel_size[0] // 2
            module.forward = lambda x, m=module, half=half: F.conv2d(
                x, m.weight, None, m.stride, half, groups=m.groups
            )


def one_symmetric_padding(model: EfficientNet) -> None:
    convs = [module for module in model.modules() if isinstance(module, SameConv2d)]
    last = convs[-1]
    last.forward = lambda x: F.conv2d(x, last.weight, None, 2, 2, groups=last.groups)


def no_skip(model: EfficientNet) -> None:
    skips = [module for module in model.modules() if getattr(module, "has_skip", False)]
    skips[-1].has_skip = False


def relu_in_the_gate(model: EfficientNet) -> None:
    gates = [module for module in model.modules() if isinstance(module, SqueezeExcite)]
    gate = gates[3]

    def forward(x: torch.Tensor) -> torch.Tensor:
        means = x.mean(dim=(2, 3), keepdim=True)
        return x * gate.conv_expand(F.relu(gate.conv_reduce(means))).sigmoid()

    gate.forward = forward


def no_activation_at_the_end(model: EfficientNet) -> None:
    model.project = lambda x: model.bn2(model.conv_head(x))


@pytest.mark.parametrize(
    "fault",
    [
        other_epsilon,
        symmetric_padding,
        one_symmetric_padding,
        no_skip,
        relu_in_the_gate,
        no_activation_at_the_end,
    ],
)
def test_comparison_catches_a_planted_fault(fault, randomised):
    ours = randomised(CONVNETS["tf_efficientnet_b0"]).double()
    theirs = theirs_of(ours)
    fault(ours)

    assert max(gaps(ours, theirs, SIZES[0])) > 0.1


def test_first_stage_adds_its_input_where_it_can(randomised):
    # Deeper forms have two blocks in the first stage; only the second can add its input.
    stage = randomised(CONVNETS["efficientnet_b2"]).blocks[0]

    assert [block.has_skip for block in stage] == [False, True]


def test_channels_are_multiples_of_eight_not_far_below_the_scale():
    for config in CONVNETS.values():
        if config.family == "efficientnet":
            base = CONVNETS["efficientnet_b0"]
            for stage, first in zip(config.stages, base.stages, strict=True):
                assert stage.channels % 8 == 0
                assert stage.channels >= 0.9 * first.channels * config.width


def test_bigger_forms_are_wider_and_deeper():
    counts = [
        sum(stage.blocks for stage in CONVNETS[f"efficientnet_b{number}"].stages)
        for number in range(8)
    ]

    assert counts == [16, 23, 23, 26, 32, 39, 45, 55]
    assert all(after >= before for before, after in pairwise(counts))
