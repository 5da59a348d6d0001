"""What the task gives to parity: rendered eyes of one scale, whatever the size of the input."""

import numpy as np
import pytest
import torch

from dinotrain.backbones.vit import ViTConfig
from dinotrain.heads.branch import HeadConfig
from dinotrain.model import ModelConfig, TaskModel
from dinotrain.tasks import get_task

TASK = get_task("eyelid")


def config(kind: str = "mlp") -> ModelConfig:
    backbone = ViTConfig(name="t", embed_dim=16, depth=1, heads=1, ffn_dim=16, grid=(4, 4))
    return ModelConfig(
        task="eyelid", backbone=backbone, image_size=(56, 56), head=HeadConfig(kind=kind)
    )


def test_outputs_with_their_units():
    outputs = TASK.outputs(config("ensemble"))
    names = ["mrd1_mm", "mrd2_mm", "lf_mm", "mrd1_std_mm", "mrd2_std_mm", "lf_std_mm"]
    assert [o.name for o in outputs] == names
    assert {(o.unit, o.shape, o.dtype) for o in outputs} == {("mm", (1,), "float32")}
    assert outputs[0].description == "corneal light reflex to upper-lid margin, signed"
    assert outputs[5].description == "standard deviation between ensemble members of lf_mm"
    assert TASK.outputs(config()) == outputs[:3]


@pytest.mark.parametrize("kind", ["mlp", "ensemble"])
def test_a_model_gives_what_is_promised(kind):
    model = TaskModel(config(kind)).eval()
    pixels = {name: torch.zeros(1, 3, 56, 56) for name in ("primary", "up", "down")}
    given = model(pixels)
    promised = TASK.outputs(model.config)
    assert list(given) == [o.name for o in promised]
    assert [tuple(v.shape) for v in given.values()] == [o.shape for o in promised]


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
