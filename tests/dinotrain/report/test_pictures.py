"""Overlays and galleries, on rendered metal."""

import io

import numpy as np
import pytest
from PIL import Image
from skimage.segmentation import find_boundaries

from dinotrain.data.synthetic.surfaces import CLASSES, render_surface
from dinotrain.errors import ShapeError
from dinotrain.report.palette import IGNORED, class_colours, rgb
from dinotrain.report.pictures import (
    mask_legend,
    mask_overlay,
    picture_grid,
    sample_strip,
    side_by_side,
)


@pytest.fixture(scope="module")
def surface():
    sample = next(s for i in range(20) if (s := render_surface(0, i, 96)).mask.any())
    return sample.image, sample.mask


def test_the_background_is_untouched_and_the_rest_is_not(surface):
    image, mask = surface
    drawn = mask_overlay(image, mask, CLASSES)
    assert drawn.dtype == np.uint8 and drawn.shape == image.shape
    assert (drawn[mask == 0] == image[mask == 0]).all()
    assert (drawn[mask != 0] != image[mask != 0]).any(axis=1).mean() > 0.99
    assert drawn is not image


def test_outlines_have_the_colour_of_the_legend():
    image = np.full((40, 40, 3), 90, np.uint8)
    mask = np.zeros((40, 40), np.uint8)
    mask[5:20, 5:20], mask[15:35, 22:36] = 1, 3
    drawn = mask_overlay(image, mask, CLASSES)
    legend = dict(mask_legend(CLASSES))
    assert list(legend) == list(CLASSES[1:])
    edge = find_boundaries(mask, mode="inner", background=0)
    for number in (1, 3):
        colour = rgb(legend[CLASSES[number]])
        outline, inside = edge & (mask == number), ~edge & (mask == number)
        assert (drawn[outline] == colour).all()
        mixed = 0.55 * np.array([90, 90, 90]) + 0.45 * np.array(colour)
        assert np.abs(drawn[inside] - mixed).max() <= 0.5  # of rounding


def test_pixels_without_a_label_are_hatched():
    image, mask = np.full((32, 32, 3), 10, np.uint8), np.zeros((32, 32), np.uint8)
    mask[:16], mask[16:20] = 255, 77
    drawn = mask_overlay(image, mask, CLASSES)
    for rows in (slice(0, 16), slice(16, 20)):
        share = (drawn[rows] != 10).any(axis=-1).mean()
        assert share == pytest.approx(0.5, abs=0.1)  # half of the stripes, cut at the edges
    assert (drawn[20:] == 10).all()
    assert mask_legend(CLASSES, ignored=True)[-1] == ("no label", IGNORED)


def test_every_class_is_tinted_where_none_is_background():
    image, mask = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)
    assert (mask_overlay(image, mask, CLASSES, background=None) > 0).any()
    assert len(mask_legend(CLASSES, background=None)) == len(CLASSES)
    assert class_colours(4, None)[0] == mask_legend(CLASSES, background=None)[0][1]


def test_a_mask_of_another_size_is_refused(surface):
    image, mask = surface
    with pytest.raises(ShapeError, match=r"\(96, 96, 3\) and mask \(96, 95\)"):
        mask_overlay(image, mask[:, 1:], CLASSES)


def test_a_gallery_keeps_pictures_and_captions(surface):
    image, _ = surface
    gallery = picture_grid([(image, "a"), (Image.fromarray(image[:48]), "b")], "two")
    assert [p.caption for p in gallery.pictures] == ["a", "b"]
    for picture, size in zip(gallery.pictures, [(96, 96), (96, 48)], strict=True):
        shown = Image.open(io.BytesIO(picture.data))
        assert shown.size == size and picture.width_px == size[0]
        # JPEG at this quality, on a noisy photograph.
        assert np.abs(np.asarray(shown, float) - image[: size[1]]).mean() < 4


def test_panels_of_any_size_stand_at_one_height():
    panels = [np.full((8, 8, 3), 255, np.uint8), np.zeros((300, 150, 3), np.uint8)]
    strip = np.asarray(side_by_side(panels, 100))
    assert strip.shape == (100, 100 + 3 + 50, 3)
    assert (strip[:, :100] == 255).all() and (strip[:, 103:] == 0).all()


def test_a_sample_without_pictures_is_a_grey_panel():
    assert np.asarray(sample_strip({})).std() == 0
