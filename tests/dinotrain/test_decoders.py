"""Measured values, deviations and intervals by NumPy and as captured graphs; class maps."""

import math

import numpy as np
import pytest
import torch

from dinotrain.decoders import ClassMapDecoder, MeasureDecoder
from dinotrain.encoding import Decoder, Encoding
from dinotrain.errors import ShapeError, UsageError
from dinotrain.intervals import Intervals
from dinotrain.tasks.base import TargetSpec

TARGETS = (
    TargetSpec("a", "mm", -6.0, 16.0, ""),
    TargetSpec("b", "mm", 0.0, 16.0, ""),
    TargetSpec("c", "mm", 0.0, 32.0, ""),
)
KINDS = ("plain", "gray", "thermometer", "johnson", "scalar", "gaussian")
MEMBERS = {"single": 1, "ensemble": 4}
METHODS = ("none", "absolute", "scaled")
FACTORS = (1.7, 0.3, 2.9)
MEAN, STD = (3.0, 5.5, 12.0), (1.25, 1.5, 4.0)


def intervals(method: str) -> Intervals | None:
    if method == "none":
        return None
    return Intervals(method=method, coverage=0.9, factors=FACTORS, subjects=(20, 20, 12))


def decoder(kind: str, method: str = "none", decoding: str = "soft") -> MeasureDecoder:
    made = MeasureDecoder(
        Encoding(kind=kind, bits=5, decoding=decoding), TARGETS, intervals(method)
    ).eval()
    made.mean.copy_(torch.tensor(MEAN))
    made.std.copy_(torch.tensor(STD))
    return made


def draw(kind: str, members: int, batch: int = 1) -> torch.Tensor:
    width = Encoding(kind=kind, bits=5).width
    return torch.randn(batch, members, 3, width, generator=torch.Generator().manual_seed(7))


def has_std(kind: str, form: str) -> bool:
    return kind == "gaussian" or form == "ensemble"


COMBINATIONS = [
    pytest.param(kind, form, method, id=f"{kind}-{form}-{method}")
    for kind in KINDS
    for form in MEMBERS
    for method in METHODS
    if method != "scaled" or has_std(kind, form)
]


@pytest.mark.parametrize(("kind", "form", "method"), COMBINATIONS)
def test_values_deviations_and_intervals_by_numpy(kind, form, method):
    logits = draw(kind, MEMBERS[form], batch=6)
    found = {k: v.double().numpy() for k, v in decoder(kind, method)(logits).items()}
    if kind == "gaussian":
        mu, variance = logits[..., 0].double().numpy(), np.exp(logits[..., 1].double().numpy())
        value = np.array(MEAN) + np.array(STD) * mu.mean(1)
        # METHODS B6: mean(σ² + μ²) − μ̄²; the floor of the variance, 1e-6, is below the tolerance.
        std = np.array(STD) * np.sqrt((variance + mu**2).mean(1) - mu.mean(1) ** 2)
    else:
        plain = Decoder(Encoding(kind=kind, bits=5), [-6, 0, 0], [16, 16, 32])
        plain.mean.copy_(torch.tensor(MEAN))
        plain.std.copy_(torch.tensor(STD))
        members = plain(logits).double().numpy()
        value, std = members.mean(1), members.std(1)
    half = np.broadcast_to(FACTORS, value.shape) * (std if method == "scaled" else 1)
    for index, name in enumerate("abc"):
        wanted = {f"{name}_mm": value[:, index]}
        if has_std(kind, form):
            wanted[f"{name}_std_mm"] = std[:, index]
        if method != "none":
            wanted[f"{name}_low_mm"] = value[:, index] - half[:, index]
            wanted[f"{name}_high_mm"] = value[:, index] + half[:, index]
        assert {key for key in found if key.startswith(f"{name}_")} == set(wanted)
        for key, numbers in wanted.items():
            # float32 sums below 64 mm; the 1e-6 of the variance adds 2e-6 mm.
            np.testing.assert_allclose(found[key], numbers, atol=5e-5)


@pytest.mark.parametrize("decoding", ["soft", "hard"])
@pytest.mark.parametrize(("kind", "form", "method"), COMBINATIONS)
def test_the_captured_graph_gives_the_same(kind, form, method, decoding):
    made, logits = decoder(kind, method, decoding), draw(kind, MEMBERS[form])
    with torch.no_grad():
        program = torch.export.export(made, (logits,)).run_decompositions({})
        found, wanted = program.module()(logits), made(logits)
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        # The same float32 operations, but for softmax and means, which decompose.
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0)
    for node in program.graph.nodes:
        assert len(getattr(node.meta.get("val"), "shape", ())) <= 4, node.name
    baked = [v for k, v in program.constants.items() if "interval" in k] + [
        v for k, v in program.state_dict.items() if "interval" in k
    ]
    if method == "none":
        assert not baked
    else:
        (constants,) = baked
        assert torch.equal(constants, torch.tensor(FACTORS))


def test_a_single_gaussian_by_hand():
    logits = torch.tensor([0.5, math.log(4.0)]).expand(1, 1, 3, 2)
    found = decoder("gaussian", "scaled")(logits)
    # 3 + 1.25·0.5; 1.25·√4; 1.7·2.5 to either side.
    assert found["a_mm"].item() == pytest.approx(3.625)
    assert found["a_std_mm"].item() == pytest.approx(2.5, rel=1e-6)
    assert found["a_low_mm"].item() == pytest.approx(3.625 - 4.25, rel=1e-5)
    assert found["a_high_mm"].item() == pytest.approx(3.625 + 4.25, rel=1e-5)


def test_the_order_of_outputs():
    names = list(decoder("gaussian", "scaled")(draw("gaussian", 2)))
    assert names == [f"{t}{part}_mm" for part in ("", "_std", "_low", "_high") for t in "abc"]


def test_intervals_add_nothing_to_checkpoints():
    assert list(decoder("gaussian", "scaled").state_dict()) == ["mean", "std"]
    assert list(decoder("gray", "absolute").state_dict()) == ["mean", "std"]


def test_what_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="its head gives none"):
        decoder("gray", "scaled")(draw("gray", 1))
    two = Intervals(method="absolute", coverage=0.9, factors=(1.0, 2.0), subjects=(9, 9))
    with pytest.raises(UsageError, match="2 factors and there are 3 targets"):
        MeasureDecoder(Encoding(), TARGETS, two)
    with pytest.raises(ShapeError, match="8 numbers per target, the encoding has 2"):
        decoder("gaussian")(torch.zeros(1, 1, 3, 8))


def test_every_pixel_gets_its_likeliest_class():
    logits = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    found = ClassMapDecoder()(logits)
    assert list(found) == ["class_map"]
    assert (found["class_map"].dtype, found["class_map"].shape) == (torch.int32, (2, 3, 4))
    best = logits.max(dim=1).values
    chosen = logits.gather(1, found["class_map"].long()[:, None])[:, 0]
    assert torch.equal(chosen, best)


def test_the_first_of_equal_classes_wins():
    logits = torch.zeros(1, 4, 1, 3)
    logits[0, 2:, 0, 1] = 1
    logits[0, 3, 0, 2] = 1
    assert ClassMapDecoder()(logits)["class_map"].tolist() == [[[0, 2, 3]]]
