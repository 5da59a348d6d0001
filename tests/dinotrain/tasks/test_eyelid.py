"""What the task gives to parity: rendered eyes of one scale, whatever the size of the input."""

import numpy as np
import pytest

from dinotrain.tasks import get_task

TASK = get_task("eyelid")


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
