"""SE-ResNet-50 against its definition written out, and against transformers' ResNet."""

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ResNetConfig, ResNetModel

from dinotrain.backbones.convnets.config import CONVNETS
from dinotrain.backbones.convnets.layers import BatchNorm
from dinotrain.backbones.convnets.seresnet import SEResNet, SqueezeExcite

# Relative to a map's spread, both sides in float64: in float32 50 layers of rounding make 1.5e-4,
# in float64 2.4e-13 was measured. Every planted fault below makes 1 and more.
TOLERANCE = 1e-10

BLOCKS = (3, 4, 6, 3)
SIZES = [(96, 96), (97, 130)]
CONFIG = CONVNETS["seresnet50"]


def defined(state: Mapping[str, Tensor], images: Tensor) -> list[Tensor]:
    """Run timm's seresnet50 as its definition reads: the four stages' outputs, then their mean.

    7×7 stem of stride 2, 3×3 maximum of stride 2; per block 1×1, 3×3 (which has the stride), 1×1;
    SE over a 16th of the channels before the shortcut is added; the shortcut of a stage's first
    block is a 1×1 convolution with the same stride.
    """

    def conv_norm(x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        weight = state[f"{conv}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=(weight.shape[-1] - 1) // 2)
        factor = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + 1e-5) ** 0.5
        offset = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * factor
        return x * factor[:, None, None] + offset[:, None, None]

    def gate(x: Tensor, name: str) -> Tensor:
        means = x.flatten(2).mean(-1)
        reduce, expand = state[f"{name}.fc1.weight"], state[f"{name}.fc2.weight"]
        assert reduce.shape[0] * 16 == x.shape[1]
        hidden = (means @ reduce[:, :, 0, 0].T + state[f"{name}.fc1.bias"]).clamp(min=0)
        scores = hidden @ expand[:, :, 0, 0].T + state[f"{name}.fc2.bias"]
        return x / (1 + torch.exp(-scores))[:, :, None, None]

    x = conv_norm(images, "conv1", "bn1", stride=2).clamp(min=0)
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    outputs = []
    for stage, count in enumerate(BLOCKS, start=1):
        for index in range(count):
            name = f"layer{stage}.{index}"
            stride = 2 if stage > 1 and index == 0 else 1
            inner = conv_norm(x, f"{name}.conv1", f"{name}.bn1").clamp(min=0)
            inner = conv_norm(inner, f"{name}.conv2", f"{name}.bn2", stride).clamp(min=0)
            inner = gate(conv_norm(inner, f"{name}.conv3", f"{name}.bn3"), f"{name}.se")
            if index == 0:
                x = conv_norm(x, f"{name}.downsample.0", f"{name}.downsample.1", stride)
            x = (x + inner).clamp(min=0)
        outputs.append(x)
    return [*outputs, x.flatten(2).mean(-1)]


def pixels(size: tuple[int, int]) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(5)).double()


def gaps(model: SEResNet, wanted: list[Tensor], images: Tensor) -> list[float]:
    with torch.no_grad():
        out, taps = model.forward_taps(images)
    found = [*taps, out.pooled]
    assert all(float(other.std()) > 0.05 for other in wanted), "dead maps agree with anything"
    assert [one.shape for one in found] == [other.shape for other in wanted]
    return [
        float((one - other).abs().max() / other.std())
        for one, other in zip(found, wanted, strict=True)
    ]


@pytest.fixture(scope="module")
def model(randomised) -> SEResNet:
    return randomised(CONFIG).double()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_its_definition(model, size):
    images = pixels(size)

    assert max(gaps(model, defined(model.state_dict(), images), images)) <= TOLERANCE


def stride_on_the_first_convolution(model: SEResNet) -> None:
    model.layer2[0].conv1.stride, model.layer2[0].conv2.stride = (2, 2), (1, 1)


def one_epsilon(model: SEResNet) -> None:
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    norms[20].eps = 1e-1


def gate_after_the_shortcut(model: SEResNet) -> None:
    block = model.layer3[1]

    def forward(x: Tensor) -> Tensor:
        inner = F.relu(block.bn1(block.conv1(x)))
        inner = F.relu(block.bn2(block.conv2(inner)))
        return F.relu(block.se(block.bn3(block.conv3(inner)) + x))

    block.forward = forward


def linear_gate(model: SEResNet) -> None:
    gate = model.layer4[0].se
    gate.forward = lambda x: x * gate.fc2(gate.fc1(x.mean((2, 3), keepdim=True))).sigmoid()


def pool_without_padding(model: SEResNet) -> None:
    model.embed = lambda images: F.max_pool2d(
        F.pad(F.relu(model.bn1(model.conv1(images))), (0, 1, 0, 1)), 3, 2
    )


@pytest.mark.parametrize(
    "fault",
    [
        stride_on_the_first_convolution,
        one_epsilon,
        gate_after_the_shortcut,
        linear_gate,
        pool_without_padding,
    ],
)
def test_comparison_catches_a_planted_fault(fault, randomised):
    model = randomised(CONFIG).double()
    images = pixels((96, 96))
    wanted = defined(model.state_dict(), images)
    fault(model)

    assert max(gaps(model, wanted, images)) > 0.1


def test_without_gates_it_is_transformers_resnet(randomised):
    model = randomised(CONFIG).double()
    for module in model.modules():
        if isinstance(module, SqueezeExcite):
            # sigmoid(40) is 1 in float32.
            module.fc2.weight.zero_()
            module.fc2.bias.fill_(40)
    theirs = ResNetModel(ResNetConfig(depths=list(BLOCKS), layer_type="bottleneck")).eval()
    state = model.state_dict()
    renamed = {}
    for key in theirs.state_dict():
        module, kind = key.rsplit(".", 1)
        if kind != "num_batches_tracked":
            renamed[key] = state[f"{our_name(module)}.{kind}"]
    assert len(renamed) == sum(".se." not in key for key in state)
    theirs.double().load_state_dict(renamed, strict=False)
    images = pixels((96, 96))
    with torch.no_grad():
        wanted = theirs(images, output_hidden_states=True)

    # hidden_states[0] is the stem's.
    outputs = [*wanted.hidden_states[1:], wanted.pooler_output.flatten(1)]
    assert max(gaps(model, outputs, images)) <= TOLERANCE


def our_name(module: str) -> str:
    """Translate transformers' names: embedder.embedder.x, encoder.stages.s.layers.l.layer.k.x."""
    parts = module.split(".")
    norm = parts[-1] == "normalization"
    if parts[0] == "embedder":
        return "bn1" if norm else "conv1"
    block = f"layer{int(parts[2]) + 1}.{parts[4]}"
    if parts[5] == "shortcut":
        return f"{block}.downsample.{int(norm)}"
    return f"{block}.{'bn' if norm else 'conv'}{int(parts[6]) + 1}"
