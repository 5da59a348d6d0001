"""The resampling rules against a plain NumPy bicubic, against transformers, and each other."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from dinotrain.backbones.position import PositionRule, check_rule, resample_position
from dinotrain.errors import ShapeError, UsageError

GRID = (37, 37)
DIM = 8
RULES: tuple[PositionRule, ...] = ("scale", "size", "size_antialias")
TARGETS = [(16, 16), (16, 23), (23, 16), (40, 40), (37, 36)]

# torch computes sampling points near 37 in float32 (half a unit in the last place: 2e-6), and
# neighbouring values differ by up to about 8; measured 9e-6.
TOLERANCE = 3e-5


def keys_cubic(x: float, a: float) -> float:
    """Keys' cubic convolution kernel."""
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    if x < 2:
        return a * (x**3 - 5 * x**2 + 8 * x - 4)
    return 0.0


def plain_matrix(size: int, target: int, step: float) -> np.ndarray:
    """(target, size): four taps at a = -0.75, borders repeated, sampled every ``step`` cells."""
    weights = np.zeros((target, size))
    for row in range(target):
        centre = (row + 0.5) * step - 0.5
        first = int(np.floor(centre)) - 1
        for tap in range(first, first + 4):
            weights[row, min(max(tap, 0), size - 1)] += keys_cubic(centre - tap, -0.75)
    return weights


def antialias_matrix(size: int, target: int) -> np.ndarray:
    """(target, size): the kernel at a = -0.5, widened when shrinking, renormalised at borders."""
    step = size / target
    width = max(step, 1.0)
    weights = np.zeros((target, size))
    for row in range(target):
        centre = (row + 0.5) * step
        first = max(int(centre - 2 * width + 0.5), 0)
        last = min(int(centre + 2 * width + 0.5), size)
        for tap in range(first, last):
            weights[row, tap] = keys_cubic((tap + 0.5 - centre) / width, -0.5)
        weights[row] /= weights[row].sum()
    return weights


def plain_resample(pos_embed: torch.Tensor, target: tuple[int, int], rule: str) -> np.ndarray:
    """The rule in float64, axis by axis: (1, N, D) → (1, N', D)."""
    planes = pos_embed.double().numpy().reshape(*GRID, -1)
    matrices = []
    for size, wanted in zip(GRID, target, strict=True):
        if rule == "size_antialias":
            matrices.append(antialias_matrix(size, wanted))
        else:
            step = size / (wanted + 0.1) if rule == "scale" else size / wanted
            matrices.append(plain_matrix(size, wanted, step))
    rows, cols = matrices
    out = np.einsum("ri,cj,ijd->rcd", rows, cols, planes)
    return out.reshape(1, -1, planes.shape[-1])


@pytest.fixture
def pos_embed() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(1, GRID[0] * GRID[1], DIM, generator=generator)


def gap(found: torch.Tensor, wanted: np.ndarray | torch.Tensor) -> float:
    return float(np.abs(found.double().numpy() - np.asarray(wanted, dtype=np.float64)).max())


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: "x".join(map(str, target)))
@pytest.mark.parametrize("rule", RULES)
def test_rule_is_the_published_formula(pos_embed, rule, target):
    found = resample_position(pos_embed, GRID, target, rule)

    assert gap(found, plain_resample(pos_embed, target, rule)) <= TOLERANCE


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: "x".join(map(str, target)))
def test_scale_is_the_call_that_the_hub_makes(pos_embed, target):
    planes = pos_embed.reshape(1, *GRID, DIM).permute(0, 3, 1, 2)
    factors = tuple((float(wanted) + 0.1) / 37.0 for wanted in target)
    wanted = F.interpolate(planes, scale_factor=factors, mode="bicubic").permute(0, 2, 3, 1)

    found = resample_position(pos_embed, GRID, target, "scale")

    assert torch.equal(found, wanted.reshape(1, -1, DIM))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: "x".join(map(str, target)))
@pytest.mark.parametrize(
    ("rule", "config", "model"),
    [
        ("size", Dinov2Config, Dinov2Model),
        ("size_antialias", Dinov2WithRegistersConfig, Dinov2WithRegistersModel),
    ],
    ids=["plain", "registers"],
)
def test_size_rules_are_those_of_transformers(pos_embed, rule, config, model, target):
    theirs = model(
        config(
            hidden_size=DIM,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=518,
            patch_size=14,
        )
    ).embeddings
    with torch.no_grad():
        theirs.position_embeddings[:, 1:] = pos_embed
        tokens = torch.zeros(1, 1 + target[0] * target[1], DIM)
        wanted = theirs.interpolate_pos_encoding(tokens, target[0] * 14, target[1] * 14)[:, 1:]

    assert torch.equal(resample_position(pos_embed, GRID, target, rule), wanted)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: "x".join(map(str, target)))
def test_rules_differ(pos_embed, target):
    found = [resample_position(pos_embed, GRID, target, rule) for rule in RULES]

    # A hundred times the tolerance: a comparison with the wrong rule cannot pass.
    for one, other in itertools.combinations(found, 2):
        assert gap(one, other) > 100 * TOLERANCE


@pytest.mark.parametrize("rule", RULES)
def test_trained_square_size_is_untouched(pos_embed, rule):
    assert resample_position(pos_embed, GRID, GRID, rule) is pos_embed


@pytest.mark.parametrize("rule", RULES)
def test_half_precision_is_resampled_in_float32(pos_embed, rule):
    half = pos_embed.half()

    found = resample_position(half, GRID, (16, 16), rule)

    assert found.dtype == torch.float16
    assert torch.equal(found, resample_position(half.float(), GRID, (16, 16), rule).half())


def test_token_count_is_checked(pos_embed):
    with pytest.raises(ShapeError, match=r"1369 patches, its grid 36×37 has 1332"):
        resample_position(pos_embed, (36, 37), (16, 16), "size")


def test_unknown_rule_names_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'size_antialias'"):
        check_rule("size_antialiased")


@pytest.mark.parametrize("fault", ["offset", "antialias", "transposed"])
def test_comparison_catches_a_planted_fault(pos_embed, fault):
    wanted = plain_resample(pos_embed, (16, 23), "scale")
    faulty = {
        "offset": lambda: resample_position(pos_embed, GRID, (16, 23), "size"),
        "antialias": lambda: resample_position(pos_embed, GRID, (16, 23), "size_antialias"),
        "transposed": lambda: (
            resample_position(pos_embed, GRID, (23, 16), "scale")
            .reshape(1, 23, 16, DIM)
            .transpose(1, 2)
            .reshape(1, -1, DIM)
        ),
    }[fault]()

    assert gap(faulty, wanted) > 100 * TOLERANCE
