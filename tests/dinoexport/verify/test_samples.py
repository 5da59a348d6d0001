"""The images of parity: always the same, of the size that is asked, and able to show faults."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dinoexport.verify
from dinoexport.verify.samples import RENDERED, parity_samples
from dinotrain.tasks import get_task

FOLDER = Path(dinoexport.verify.__file__).parent / "samples"
Samples = list[dict[str, np.ndarray]]
SIZES = [(224, 224), (56, 56), (42, 70)]


def samples(size: tuple[int, int] = (56, 56)) -> Samples:
    return parity_samples(get_task("eyelid"), size)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_sizes(size: tuple[int, int]) -> None:
    found = samples(size)
    assert len(found) == 2 + RENDERED
    for sample in found:
        assert list(sample) == ["primary", "up", "down"]
        for image in sample.values():
            assert image.shape == (*size, 3)
            assert image.dtype == np.uint8


def test_the_same_bytes_each_time() -> None:
    first = samples()
    # Not from the generators that a caller may have seeded or used.
    np.random.seed(9)
    np.random.random(3)
    torch.manual_seed(9)
    for one, two in zip(first, samples(), strict=True):
        for name in one:
            assert one[name].tobytes() == two[name].tobytes()


def test_no_two_images_of_a_sample_are_the_same() -> None:
    """Or an artifact that mixes up its inputs would pass."""
    for sample in samples():
        assert len({image.tobytes() for image in sample.values()}) == 3
    assert len({image.tobytes() for s in samples() for image in s.values()}) == 4 + 3 * RENDERED


def test_all_photographs_are_used() -> None:
    found = {image.tobytes() for sample in samples((42, 70)) for image in sample.values()}
    photographs = list(FOLDER.glob("*.png"))
    assert len(photographs) == 4
    for file in photographs:
        image = Image.open(file).convert("RGB").resize((70, 42), Image.Resampling.BICUBIC)
        assert np.asarray(image).tobytes() in found, file.name


def blind_to(image: np.ndarray) -> list[str]:
    """Faults that a model could have unseen on this image. Levels: 0 to 255.

    5 levels are two per cent of the range, and float32 tells parts of 10⁷: at this contrast a fault
    changes what the model reads by more than rounding could hide. The palest image here has 6.7.
    """
    x = image.astype(np.float64)
    found = []
    if x.std() < 15 or np.ptp(x) < 128:
        found.append("contrast")
    if np.abs(x[..., 0] - x[..., 2]).mean() < 5:
        found.append("colours swapped")
    if np.abs(x - x[:, ::-1]).mean() < 5:
        found.append("mirrored")
    if np.abs(x - x[::-1]).mean() < 5:
        found.append("upside down")
    if min(np.abs(x - np.roll(x, 14, axis)).mean() for axis in (0, 1)) < 5:
        found.append("a patch off")
    return found


@pytest.mark.parametrize("size", [(224, 224), (56, 56)])
def test_they_show_faults(size: tuple[int, int]) -> None:
    for index, sample in enumerate(samples(size)):
        for name, image in sample.items():
            assert blind_to(image) == [], (index, name)


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda image: image // 8, "contrast"),
        (lambda image: image[..., 1:2].repeat(3, axis=2), "colours swapped"),
        (lambda image: np.maximum(image, image[:, ::-1]), "mirrored"),
        (lambda image: np.maximum(image, image[::-1]), "upside down"),
        (lambda image: np.tile(image[:14, :14], (4, 4, 1)), "a patch off"),
    ],
)
def test_that_check_sees_a_blind_image(
    spoil: Callable[[np.ndarray], np.ndarray], fault: str
) -> None:
    assert fault in blind_to(spoil(samples()[0]["primary"]))
