"""What the task gives to parity: rendered eyes of one scale, whatever the size of the input."""

import json

import numpy as np
import pytest
import torch
from scipy import stats

from dinotrain.backbones.vit import ViTConfig
from dinotrain.checkpoint import CheckpointConfig, load_checkpoint, save_checkpoint
from dinotrain.encoding import Encoding
from dinotrain.heads.branch import HeadConfig
from dinotrain.intervals import Intervals
from dinotrain.model import ModelConfig, TaskModel
from dinotrain.tasks import get_task

TASK = get_task("eyelid")


KINDS = ("plain", "gray", "thermometer", "johnson", "scalar", "gaussian")
INTERVALS = Intervals(
    method="absolute", coverage=0.9, factors=(1.0, 1.1, 2.5), subjects=(30, 30, 21)
)


def config(
    kind: str = "mlp", encoding: str = "gray", intervals: Intervals | None = None
) -> ModelConfig:
    backbone = ViTConfig(name="t", embed_dim=16, depth=1, heads=1, ffn_dim=16, grid=(4, 4))
    return ModelConfig(
        task="eyelid",
        backbone=backbone,
        image_size=(56, 56),
        head=HeadConfig(kind=kind),
        encoding=Encoding(kind=encoding, bits=4),
        intervals=intervals,
    )


def test_outputs_with_their_units():
    outputs = TASK.outputs(config("ensemble"))
    names = ["mrd1_mm", "mrd2_mm", "lf_mm", "mrd1_std_mm", "mrd2_std_mm", "lf_std_mm"]
    assert [o.name for o in outputs] == names
    assert {(o.unit, o.shape, o.dtype) for o in outputs} == {("mm", (1,), "float32")}
    assert outputs[0].description == "corneal light reflex to upper-lid margin, signed"
    assert outputs[5].description == "standard deviation between ensemble members of lf_mm"
    assert TASK.outputs(config()) == outputs[:3]


def test_descriptions_say_what_a_deviation_and_an_interval_are():
    texts = {o.name: o.description for o in TASK.outputs(config("mlp", "gaussian", INTERVALS))}
    assert texts["lf_std_mm"] == "standard deviation of lf_mm"
    assert texts["lf_low_mm"] == (
        "lower end of the 90 % interval of lf_mm for a new subject; split conformal, calibrated on "
        "21 validation subjects, by whom the weights were chosen too"
    )
    assert texts["mrd1_high_mm"].startswith("upper end of the 90 % interval of mrd1_mm")
    assert "on 30 validation subjects" in texts["mrd1_high_mm"]
    texts = {o.name: o.description for o in TASK.outputs(config("ensemble", "gaussian"))}
    assert texts["lf_std_mm"] == "standard deviation of the mixture of ensemble members of lf_mm"
    assert "lf_low_mm" not in texts


@pytest.mark.parametrize("intervals", [None, INTERVALS], ids=["bare", "intervals"])
@pytest.mark.parametrize("encoding", KINDS)
@pytest.mark.parametrize("kind", ["mlp", "ensemble"])
def test_a_model_gives_what_is_promised(kind, encoding, intervals):
    model = TaskModel(config(kind, encoding, intervals)).eval()
    pixels = {name: torch.zeros(1, 3, 56, 56) for name in ("primary", "up", "down")}
    given = model(pixels)
    promised = TASK.outputs(model.config)
    assert list(given) == [o.name for o in promised]
    assert [tuple(v.shape) for v in given.values()] == [o.shape for o in promised]


def test_intervals_come_and_go_with_all_weights_kept():
    model = TaskModel(config("ensemble", "gaussian")).eval()
    model.decoder.mean.copy_(torch.tensor([3.0, 6.0, 14.0]))
    logits = torch.randn(2, 5, 3, 2)
    before = model.decode(logits)
    model.set_intervals_(INTERVALS)
    after = model.decode(logits)
    assert model.config.intervals == INTERVALS
    assert list(after) == [o.name for o in TASK.outputs(model.config)]
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(after["lf_high_mm"], before["lf_mm"] + 2.5)
    assert not model.decoder.training
    model.set_intervals_(None)
    assert list(model.decode(logits)) == list(before)


def test_a_checkpoint_keeps_its_intervals(tmp_path):
    plain = config("mlp", "gaussian", INTERVALS)
    fields = {name: getattr(plain, name) for name in ModelConfig.__struct_fields__}
    model = TaskModel(plain).eval()
    file = save_checkpoint(model, CheckpointConfig(**fields), tmp_path / "a.safetensors")
    again, header = load_checkpoint(file)
    assert header.intervals == INTERVALS
    logits = torch.randn(2, 1, 3, 2)
    for name, value in model.decode(logits).items():
        assert torch.equal(again.decode(logits)[name], value)


def predictions() -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(0)
    true = rng.normal([3, 6, 14], 1, size=(40, 3))
    true[::4, 2] = np.nan
    found = {}
    for index, target in enumerate(TASK.targets):
        guess = np.nan_to_num(true[:, index]) + rng.normal(size=40)
        low, high = target.interval_names
        found |= {target.output_name: guess, target.std_name: np.full(40, 1.5)}
        found |= {low: guess - 2, high: guess + 2}
    return found, true


def test_all_that_a_model_states_is_judged():
    predicted, true = predictions()
    rows = TASK.evaluate(predicted, true, true, subjects=[index // 2 for index in range(40)])
    assert list(rows) == ["mrd1_mm", "mrd2_mm", "lf_mm"]
    row, kept = rows["lf_mm"], ~np.isnan(true[:, 2])
    # METHODS B8: every figure of its list.
    assert {
        "n", "mse_mm2", "mae_mm", "rmse_mm", "r2", "bias_mm", "loa_low_mm", "loa_high_mm",
        "icc_2_1", "within_0_5_mm_percent", "within_1_0_mm_percent", "mean_predictor",
        "crps_mm", "calibration_error", "coverage_curve", "mean_std_mm",
        "interval_rows_covered", "interval_subjects_covered", "interval_width_mm",
    } <= set(row)  # fmt: skip
    error = (predicted["lf_mm"] - true[:, 2])[kept]
    assert row["n"] == kept.sum() == 30
    assert row["mse_mm2"] == pytest.approx((error**2).mean())
    assert row["interval_rows_covered"] == pytest.approx((abs(error) <= 2).mean())
    assert row["interval_width_mm"] == pytest.approx(4)
    z = error / 1.5
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    crps = 1.5 * (z * (2 * stats.norm.cdf(z) - 1) + 2 * density - np.pi**-0.5)
    assert row["crps_mm"] == pytest.approx(crps.mean())
    json.dumps(rows, allow_nan=False)


def test_what_a_model_does_not_state_is_left_out():
    predicted, true = predictions()
    values = {t.output_name: predicted[t.output_name] for t in TASK.targets}
    row = TASK.evaluate(values, true, true)["mrd1_mm"]
    assert "mae_mm" in row
    assert not [key for key in row if key.startswith(("crps", "interval", "calibration"))]
    nameless = TASK.evaluate(predicted, true, true)["mrd1_mm"]
    assert "interval_rows_covered" in nameless
    assert "interval_subjects_covered" not in nameless


@pytest.mark.parametrize(
    "size", [(14, 14), (28, 42), (56, 56), (42, 70), (14, 98), (98, 14)], ids=str
)
def test_samples_have_the_size_that_is_asked(size):
    samples = TASK.render_samples(2, size)
    assert len(samples) == 2
    for sample in samples:
        assert list(sample) == ["primary", "up", "down"]
        assert all(i.shape == (*size, 3) and i.dtype == np.uint8 for i in sample.values())
        assert all(np.ptp(i) > 60 for i in sample.values())


@pytest.mark.parametrize("size", [(84, 140), (168, 140)], ids=str)
def test_the_width_is_the_window_whatever_the_height(size):
    """The middle of a wide, a high and a square picture shows the same millimetres."""
    middle, width = min(size), size[1]

    def centre(image: np.ndarray) -> np.ndarray:
        top, left = (image.shape[0] - middle) // 2, (width - middle) // 2
        return image[top : top + middle, left : left + middle].astype(float).ravel()

    square = centre(TASK.render_samples(1, (width, width))[0]["primary"])
    other = TASK.render_samples(1, size)[0]["primary"]
    # Grain is drawn per pixel, so only the shape of the eye must agree.
    assert np.corrcoef(square, centre(other))[0, 1] > 0.95
    # The same test sees a picture that is a fifth too large.
    assert np.corrcoef(square, centre(enlarged(other)))[0, 1] < 0.95


def enlarged(image: np.ndarray) -> np.ndarray:
    rows, cols = ((np.arange(n) - n / 2) / 1.2 + n / 2 for n in image.shape[:2])
    return image[rows.astype(int)][:, cols.astype(int)]
