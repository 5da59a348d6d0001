"""Augmentation: repeatable, alike for picture and mask, and each change as far as it should go."""

import numpy as np
import pytest
from scipy import ndimage

from dinotrain.data import augment as module
from dinotrain.data.augment import CHANGES, AugmentConfig, augment, sample_stream
from dinotrain.data.masks import IGNORE
from dinotrain.errors import ShapeError, UsageError

NOTHING = dict.fromkeys(CHANGES, 0.0)


def only(name: str, **options) -> AugmentConfig:
    return AugmentConfig(**(NOTHING | {name: 1.0} | options))


def stream(number: int = 0) -> np.random.Generator:
    return sample_stream(7, 2, f"sample {number}")


@pytest.fixture
def pair():
    """Return a picture whose grey is 60 in class 0, 130 in class 1 and 200 in class 2."""
    field = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((96, 120)), 7)
    mask = np.digitize(field, np.quantile(field, [0.6, 0.85])).astype(np.uint8)
    grey = np.array([60, 130, 200], np.uint8)[mask]
    return np.repeat(grey[..., None], 3, axis=2), mask


def disagreement(image, mask) -> float:
    """Share of the labelled pixels whose grey tells another class than the mask."""
    told = np.digitize(image[..., 1], [95, 165])
    labelled = mask != IGNORE
    return float((told != mask)[labelled].mean())


def test_no_change_gives_the_same_bytes_in_new_memory(pair):
    levels = np.arange(256 * 3, dtype=np.uint16).reshape(16, 16, 3).astype(np.uint8)
    for image, mask in (pair, (np.tile(levels, (3, 3, 1)), np.full((48, 48), IGNORE, np.uint8))):
        found = augment(image, mask, AugmentConfig(**NOTHING), stream())
        assert np.array_equal(found[0], image)
        assert np.array_equal(found[1], mask)
        assert not np.shares_memory(found[0], image)
        assert not np.shares_memory(found[1], mask)


def test_a_sample_repeats_and_another_epoch_or_sample_differs(pair):
    config = AugmentConfig(**(NOTHING | {"rotate": 1, "elastic": 1, "clahe": 1, "dropout": 1}))
    first = augment(*pair, config, sample_stream(0, 3, "a"))
    again = augment(*pair, config, sample_stream(0, 3, "a"))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (sample_stream(1, 3, "a"), sample_stream(0, 4, "a"), sample_stream(0, 3, "b")):
        assert not np.array_equal(first[0], augment(*pair, config, other)[0])


def test_the_global_random_state_is_neither_read_nor_moved(pair):
    import torch

    config = AugmentConfig(**dict.fromkeys(CHANGES, 1.0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = augment(*pair, config, stream())[0]
        torch.manual_seed(1)
        state = torch.get_rng_state()
        assert np.array_equal(first, augment(*pair, config, stream())[0])
        assert torch.equal(state, torch.get_rng_state())


def test_another_probability_of_one_change_leaves_the_others_alone(pair):
    few = only("rotate", blur=0.0)
    many = only("rotate", blur=1e-9)
    assert np.array_equal(augment(*pair, few, stream())[0], augment(*pair, many, stream())[0])
    both = AugmentConfig(**(NOTHING | {"rotate": 1.0, "dropout": 1.0}))
    alone, _ = augment(*pair, only("dropout"), stream())
    turned, mask = augment(*pair, both, stream())
    # The holes are where they are without the rotation.
    assert np.array_equal(mask == IGNORE, (alone == 0).all(axis=2))
    assert (turned[mask == IGNORE] == 0).all()


@pytest.mark.parametrize("name", ["horizontal_flip", "vertical_flip", "rotate", "elastic"])
def test_picture_and_mask_move_alike(name, pair):
    together, behind = [], []
    for number in range(6):
        image, mask = augment(*pair, only(name), stream(number))
        together.append(disagreement(image, mask))
        behind.append(disagreement(image, pair[1]))
    # Greys between two classes stand on outlines only, within a pixel.
    assert np.mean(together) < 0.02
    # A mask that stays behind is seen.
    assert np.mean(behind) > 0.04


def test_a_mask_that_is_two_pixels_off_is_seen(pair):
    image, mask = augment(*pair, only("rotate"), stream())
    assert disagreement(image, np.roll(mask, 2, axis=1)) > 0.06


def test_flips_are_exact(pair):
    image, mask = augment(*pair, only("horizontal_flip"), stream())
    assert np.array_equal(image, pair[0][:, ::-1])
    assert np.array_equal(mask, pair[1][:, ::-1])
    image, mask = augment(*pair, only("vertical_flip"), stream())
    assert np.array_equal(image, pair[0][::-1])
    assert np.array_equal(mask, pair[1][::-1])


def test_masks_hold_only_ids_that_they_held(pair):
    image, mask = pair
    # Ids 0 and 9 side by side: any mixing would give one between.
    mask = np.where(mask == 1, 9, np.where(mask == 2, IGNORE, 0)).astype(np.uint8)
    for number in range(4):
        _, found = augment(
            image, mask, AugmentConfig(**dict.fromkeys(CHANGES, 1.0)), stream(number)
        )
        assert set(np.unique(found)) <= {0, 9, IGNORE}


def test_a_mixing_resize_of_masks_would_be_seen(pair, monkeypatch):
    def move(self, operation):
        self.pixels, self.ids = operation(self.pixels, "bilinear"), operation(self.ids, "bilinear")

    monkeypatch.setattr(module._Pair, "move", move)
    image, mask = pair
    mask = np.where(mask == 1, 9, 0).astype(np.uint8)
    _, found = augment(image, mask, only("rotate"), stream())
    assert not set(np.unique(found)) <= {0, 9}


def test_rotation_turns_by_at_most_the_angle():
    image = np.zeros((101, 101, 3), np.uint8)
    image[48:53, 88:93] = 255  # a dot 40 pixels right of the centre
    angles = []
    for number in range(60):
        turned, _ = augment(image, None, only("rotate"), stream(number))
        row, col = ndimage.center_of_mass(turned[..., 0])
        assert np.hypot(row - 50, col - 50) == pytest.approx(40, abs=0.5)
        angles.append(np.degrees(np.arctan2(row - 50, col - 50)))
    # 60 uniform draws over ±15° come within 2° of both ends but for 1 case in 50.
    assert -15.3 < min(angles) < -13
    assert 13 < max(angles) < 15.3


def test_bend_is_as_large_as_asked_for():
    """Pixels that carry their own position tell how far each was moved."""
    shifts = []
    for number in range(12):
        rows, cols = np.mgrid[:120, :90]
        image = np.stack([2 * rows, 2 * cols, 0 * rows], axis=2).astype(np.uint8)
        bent, _ = augment(image, None, only("elastic"), stream(number))
        inner = (slice(25, -25), slice(25, -25))
        shifts.append([(bent[..., 0] / 2 - rows)[inner], (bent[..., 1] / 2 - cols)[inner]])
    rms = np.sqrt(np.mean(np.square(shifts), axis=(0, 2, 3)))
    # 1 % of the shorter side in both axes; a dozen fields of few bumps give it to a fifth.
    assert rms == pytest.approx([0.9, 0.9], rel=0.2)


def test_relighting_is_linear_and_bounded():
    image = np.zeros((40, 40, 3), np.uint8)
    image[:20], image[20:] = 100, 150
    seen = []
    for number in range(80):
        found, _ = augment(image, None, only("brightness_contrast"), stream(number))
        low, high = float(found[0, 0, 0]), float(found[-1, 0, 0])
        contrast = (high - low) / 50
        seen.append((contrast - 1, (low - 100 * contrast) / 255))
    changes = np.array(seen)
    # Two rounded levels over 50 give the contrast to 0.02, and the brightness follows.
    assert np.abs(changes).max() < 0.23
    assert changes.max(axis=0).min() > 0.15
    assert changes.min(axis=0).max() < -0.15


def test_blur_is_gaussian():
    image = np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for kernel, sigma in ((3, 0.8), (5, 1.1), (7, 1.4)):
        found, _ = augment(image, None, only("blur", blur_kernels=(kernel,)), stream())
        wanted = ndimage.gaussian_filter(
            image.astype(float), (sigma, sigma, 0), mode="mirror", radius=(kernel // 2,) * 2 + (0,)
        )
        # Half a level of rounding.
        assert np.abs(found - wanted).max() < 0.51


def test_clahe_raises_local_contrast_and_keeps_hues(pair):
    rng = np.random.default_rng(2)
    image = (np.array([150, 110, 80]) + rng.normal(0, 2, (96, 120, 1))).astype(np.uint8)
    found, mask = augment(image, pair[1], only("clahe"), stream())
    assert found.std(axis=(0, 1)).min() > 1.5 * image.std(axis=(0, 1)).max()
    assert np.array_equal(mask, pair[1])
    # Brighter or darker, the order and the distance of the channels stay.
    assert (found[..., 0] > found[..., 1]).all()
    assert (found[..., 1] > found[..., 2]).all()
    strong, _ = augment(image, None, only("clahe", clahe_clip=8.0), stream())
    assert strong.std() > found.std()


def test_holes_are_black_unlabelled_and_few(pair):
    image, mask = np.maximum(pair[0], 1), pair[1]
    counts = []
    for number in range(60):
        found, ids = augment(image, mask, only("dropout"), stream(number))
        hidden = (found == 0).all(axis=2)
        assert np.array_equal(ids == IGNORE, hidden)
        assert np.array_equal(found[~hidden], image[~hidden])
        assert np.array_equal(ids[~hidden], mask[~hidden])
        counts.append(ndimage.label(hidden)[1])
        # Eight holes of at most a tenth by a tenth.
        assert 0 < hidden.mean() <= 0.08 + 0.01
    assert min(counts) == 1
    assert 6 <= max(counts) <= 8


def test_each_change_happens_as_often_as_it_should(monkeypatch):
    done = dict.fromkeys(CHANGES, 0)

    def counting(name):
        def step(*_):
            done[name] += 1

        return step

    monkeypatch.setattr(module, "_STEPS", {name: counting(name) for name in CHANGES})
    small = np.zeros((32, 32, 3), np.uint8)
    for number in range(600):
        augment(small, None, AugmentConfig(), stream(number))
    wanted = {
        "horizontal_flip": 0.5,
        "vertical_flip": 0.3,
        "rotate": 0.5,
        "elastic": 0.3,
        "clahe": 0.3,
        "brightness_contrast": 0.5,
        "blur": 0.3,
        "dropout": 0.3,
    }
    # Four standard deviations of a share over 600 draws are 0.08.
    assert {name: count / 600 for name, count in done.items()} == pytest.approx(wanted, abs=0.08)


@pytest.mark.parametrize("shape", [(32, 32), (33, 47), (224, 56)])
def test_all_sizes_and_no_mask(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    found, mask = augment(image, None, AugmentConfig(**dict.fromkeys(CHANGES, 1.0)), stream())
    assert (found.shape, found.dtype, mask) == (image.shape, np.uint8, None)


def test_refusals(pair):
    with pytest.raises(ShapeError, match="both must have one size"):
        augment(pair[0], pair[1][:-1], AugmentConfig(), stream())
    with pytest.raises(UsageError, match=r"'rotate' has probability 1\.5"):
        AugmentConfig(rotate=1.5)
    with pytest.raises(UsageError, match="odd sizes from 3"):
        AugmentConfig(blur_kernels=(4,))
    with pytest.raises(UsageError, match=r"sides of 0\.2 to 0\.1"):
        AugmentConfig(hole_sides=(0.2, 0.1))
    with pytest.raises(UsageError, match="0 holes"):
        AugmentConfig(max_holes=0)
