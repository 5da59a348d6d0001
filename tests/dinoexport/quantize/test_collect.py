"""Statistics against plain NumPy over all activations, and models that are refused."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dinoexport.errors import BuildError, BundleError
from dinoexport.graph.deploy_blocks import PlainAttention
from dinoexport.quantize.calibration import read_record, record_calibration, write_record
from dinoexport.quantize.collect import calibrate, fused_attention, to_pixels
from dinoexport.quantize.layers import weighted_layers
from dinoexport.quantize.observers import get_observer
from dinoexport.quantize.prepare import prepare_
from dinoexport.recipes import parse_recipe

LAYER = "blocks.1.mlp.fc2"


@pytest.fixture(scope="module")
def linear(_deployed, pictures) -> tuple[np.ndarray, np.ndarray]:
    """All that ``LAYER`` reads and gives, (tokens, channels) each."""
    read, given = [], []

    def keep(_module, inputs, output) -> None:
        read.append(inputs[0])
        given.append(output)

    hook = weighted_layers(_deployed)[LAYER].register_forward_hook(keep)
    with torch.no_grad(), fused_attention(_deployed):
        for sample in pictures.samples:
            _deployed(*to_pixels(_deployed, sample))
    hook.remove()
    return tuple(torch.cat(x).flatten(0, 1).numpy() for x in (read, given))  # type: ignore[return-value]


def test_statistics_are_those_of_all_activations(calibration, linear, _deployed) -> None:
    assert list(calibration.layers) == list(weighted_layers(_deployed))
    found = calibration.layers[LAYER]
    for statistics, values in zip((found.input, found.output), linear, strict=True):
        assert statistics.minimum == values.min() and statistics.maximum == values.max()
        np.testing.assert_array_equal(statistics.channel_minimum, values.min(axis=0))
        np.testing.assert_array_equal(statistics.channel_maximum, values.max(axis=0))
        np.testing.assert_array_equal(statistics.channel_peaks, np.abs(values).max(axis=0))
        assert statistics.shape == (3, len(values) // 24, values.shape[1])


def test_convolutions_have_their_own_channel_axis(calibration) -> None:
    patches = calibration.layers["patch_embed.proj"]
    assert patches.input.channel_peaks.shape == (3,)
    assert patches.output.channel_peaks.shape == (64,)
    assert patches.input.maximum <= 255


def test_the_observer_chooses_the_range(deploy, pictures, linear) -> None:
    found = calibrate(deploy, pictures, get_observer("percentile"))
    low, high = found.layers[LAYER].output.range
    near = np.quantile(linear[1], [5e-5, 1 - 5e-5], method="inverted_cdf")
    width = 2 * 2 ** np.ceil(np.log2(np.abs(linear[1]).max())) / 8192
    np.testing.assert_allclose([low, high], near, atol=width)
    assert found.observer.label == "percentile"


def test_attention_is_fused_only_while_it_is_watched(deploy, pictures, monkeypatch) -> None:
    """What is captured stays plain products; what is watched gives the same."""
    pixels = to_pixels(deploy, pictures.samples[0])
    kernel, calls = F.scaled_dot_product_attention, []

    def count(*tensors, **options):
        calls.append(1)
        return kernel(*tensors, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", count)
    with torch.no_grad():
        plain = deploy(*pixels)
        assert not calls
        with fused_attention(deploy):
            fused = deploy(*pixels)
        assert len(calls) == sum(isinstance(m, PlainAttention) for m in deploy.modules()) > 0
        again = deploy(*pixels)
    for one, other, last in zip(plain, fused, again, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
        assert torch.equal(last, one)


def test_progress_is_told(deploy, pictures) -> None:
    told = []
    calibrate(deploy, pictures, progress=lambda *done: told.append(done))
    assert told == [(i + 1, 8) for i in range(8)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_name_the_layer(deploy, pictures, value: float) -> None:
    weighted_layers(deploy)[LAYER].bias[3] = value
    with pytest.raises(BuildError, match=f"{LAYER} gives numbers that are not finite"):
        calibrate(deploy, pictures)


def test_a_layer_that_reads_one_number_is_refused(deploy, pictures) -> None:
    first = weighted_layers(deploy)["blocks.1.mlp.fc1"]
    first.weight.zero_()
    first.bias.zero_()
    with pytest.raises(BuildError, match=f"{LAYER} reads 0 everywhere"):
        calibrate(deploy, pictures)


def test_hooks_do_not_stay(deploy, pictures) -> None:
    calibrate(deploy, pictures)
    assert not any(module._forward_hooks for module in deploy.modules())


def test_the_record_can_be_read_back(deploy, calibration, tmp_path: Path) -> None:
    layers = prepare_(deploy, parse_recipe("w8a8:blocks.0=w8"), calibration)
    record = record_calibration(calibration, "w8a8:blocks.0=w8", layers)
    assert read_record(write_record(tmp_path, record)) == record
    assert record.sha256 == calibration.pictures.sha256 and record.count == 8
    fc2 = record.layers[LAYER]
    assert fc2.input_range == pytest.approx(calibration.layers[LAYER].input.range, rel=1e-5)
    assert record.layers["blocks.0.mlp.fc2"].input_range is None
    assert fc2.input.peak_ratio > 1
    (tmp_path / "calibration.json").write_text("{}")
    with pytest.raises(BundleError, match="not a record of a calibration"):
        read_record(tmp_path / "calibration.json")
    write_record(tmp_path, type(record)(**{**_fields(record), "format_version": 9}))
    with pytest.raises(BundleError, match="calibration format 9"):
        read_record(tmp_path / "calibration.json")


def _fields(record) -> dict:
    return {name: getattr(record, name) for name in record.__struct_fields__}


def test_no_pictures_are_no_calibration(deploy, pictures) -> None:
    with pytest.raises(BuildError):
        calibrate(deploy, dataclasses.replace(pictures, samples=()))
