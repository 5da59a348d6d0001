"""Rendered metal: masks stand where the picture changed, bytes repeat, data sets are whole."""

import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from dinotrain.data.mask_folder import read_mask_folder
from dinotrain.data.synthetic import surfaces
from dinotrain.data.synthetic.flaws import CLASSES, DUST, RUNDOWN, SCRATCH
from dinotrain.data.synthetic.metal import FIELD_MM, FINISHES, grid_of, noise
from dinotrain.data.synthetic.surfaces import MIN_SIDE_PX, render_surface, write_dataset
from dinotrain.errors import DataError, UsageError

SIZE = 250
PX_PER_MM = SIZE / FIELD_MM


@pytest.fixture(scope="module")
def pairs():
    """Return 24 pictures with defects and the same ones without."""
    return [
        (render_surface(5, index, SIZE), render_surface(5, index, SIZE, flawless=True).image)
        for index in range(40)
        if surfaces._shown(5, index)
    ][:24]


def change(sample, plain) -> np.ndarray:
    return np.abs(sample.image.astype(int) - plain.astype(int)).max(axis=2)


def beside(mask, near_mm: float, far_mm: float) -> np.ndarray:
    """Pixels at a distance from the mask."""
    distance = ndimage.distance_transform_edt(mask == 0) / PX_PER_MM
    return (distance > near_mm) & (distance < far_mm)


def contrast(sample, plain, mask, number) -> float:
    """How much more the picture changed under a class than beside all defects."""
    changed = change(sample, plain)
    return changed[mask == number].mean() / max(changed[beside(mask, 0.5, 1.2)].mean(), 0.5)


def test_nothing_changes_away_from_the_masks(pairs):
    for sample, plain in pairs:
        # Shadows fade within a millimetre, below half a level at two; a speck that lies outside the
        # picture may still throw one into its rim.
        away = beside(sample.mask, 2.2, 1e9)[12:-12, 12:-12]
        assert away.any()
        assert change(sample, plain)[12:-12, 12:-12][away].max() <= 1


@pytest.mark.parametrize("number", [DUST, RUNDOWN, SCRATCH], ids=CLASSES[1:])
def test_every_class_is_seen_where_its_mask_is(pairs, number):
    shown = [pair for pair in pairs if (pair[0].mask == number).sum() > 30]
    assert len(shown) >= 5
    for sample, plain in shown:
        assert contrast(sample, plain, sample.mask, number) > 3
        # Most of a defect differs from the bare metal by more than the camera's noise.
        assert (change(sample, plain)[sample.mask == number] > 5).mean() > 0.5


@pytest.mark.parametrize("number", [DUST, SCRATCH], ids=["Dust", "Scratch"])
def test_a_mask_that_is_off_is_noticed(pairs, number):
    for sample, plain in pairs:
        if (sample.mask == number).sum() > 30:
            true = contrast(sample, plain, sample.mask, number)
            shifted = np.roll(sample.mask, (5, 5), axis=(0, 1))
            assert contrast(sample, plain, shifted, number) < true / 2


def test_outlines_lie_on_the_edges_of_the_picture(pairs):
    """Of a mask moved by up to two pixels, the one in place holds the change best."""
    best = []
    for sample, plain in pairs:
        changed = np.minimum(change(sample, plain), 40).astype(float)
        scores = {}
        for shift in [(0, 0), (2, 0), (-2, 0), (0, 2), (0, -2)]:
            mask = np.roll(sample.mask, shift, axis=(0, 1)) > 0
            scores[shift] = np.corrcoef(mask.ravel(), changed.ravel())[0, 1]
        best.append(max(scores, key=lambda s: scores[s]) == (0, 0))
    # A clear run changes little but its rims, which are dark on one side and bright on the other.
    assert np.mean(best) > 0.9


def test_the_same_arguments_give_the_same_bytes():
    first, again = render_surface(1, 2, 96), render_surface(1, 2, 96)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.mask, again.mask)
    assert first.image.dtype == first.mask.dtype == np.uint8
    for other in (render_surface(2, 2, 96), render_surface(1, 3, 96)):
        assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("index", [0, 1, 3])
def test_another_size_shows_the_same_defects(index):
    small, large = render_surface(0, index, 128).mask > 0, render_surface(0, index, 256).mask > 0
    halved = large.reshape(128, 2, 128, 2).mean(axis=(1, 3)) >= 0.5
    # Outlines may differ by half a pixel, and lines are never thinner than the size can show.
    grown = ndimage.binary_dilation(small, iterations=1)
    assert halved.any()
    assert (halved & ~grown).sum() < 0.02 * halved.sum()
    assert abs(small.mean() - large.mean()) < 0.5 * large.mean()


def test_a_smaller_field_shows_larger_defects():
    for index in (0, 1, 3):
        wide = render_surface(0, index, 128).mask
        near = render_surface(0, index, 128, field_mm=25).mask
        assert set(np.unique(near)) <= set(np.unique(wide)) | {0}
        # Their number stays, their area in pixels is up to four times as large.
        assert 1.3 * (wide > 0).sum() < (near > 0).sum() < 4.5 * (wide > 0).sum()


def test_noise_has_unit_spread_and_its_bumps_are_those_of_any_size():
    fields = [noise(np.random.default_rng(3), grid_of(size), 1.5) for size in (150, 300)]
    # About 1100 independent bumps: the spread is known to 2 %, its tails to a little more.
    assert fields[0].std() == pytest.approx(1, abs=0.08)
    halved = fields[1].reshape(150, 2, 150, 2).mean(axis=(1, 3))
    assert np.corrcoef(halved.ravel(), fields[0].ravel())[0, 1] > 0.99


def anisotropy(image) -> float:
    """Ratio of the gradients' energy across and along their main direction."""
    grey = image.mean(axis=2)
    dy, dx = np.gradient(grey)
    values = np.linalg.eigvalsh(np.cov(np.stack([dx.ravel(), dy.ravel()])))
    return values[1] / values[0]


def test_brushed_metal_has_a_direction_and_cast_metal_has_none():
    found = {finish: [] for finish in FINISHES}
    for index in range(30):
        sample = render_surface(0, index, 160, flawless=True)
        found[sample.finish].append(anisotropy(sample.image))
    assert all(len(values) >= 3 for values in found.values())
    # Lamps from one side tilt the even ones a little.
    assert np.median(found["brushed"]) > 2.5
    assert np.median(found["cast"]) < 1.6
    assert np.median(found["coated"]) < 1.6


def test_classes_come_as_often_as_they_should():
    shown = [surfaces._shown(0, index) for index in range(2000)]
    assert sum(share for _, share in surfaces._MIXES) == pytest.approx(1)
    wanted = {DUST: 0.40, RUNDOWN: 0.36, SCRATCH: 0.40}
    for number, share in wanted.items():
        # Four standard deviations of a share over 2000 draws.
        assert sum(number in s for s in shown) / 2000 == pytest.approx(share, abs=0.045)
    assert sum(not s for s in shown) / 2000 == pytest.approx(0.2, abs=0.04)


def test_mixes_are_drawn_as_named_and_one_class_does_not_move_another():
    for index in range(12):
        ids = set(np.unique(render_surface(0, index, 128).mask).tolist())
        # A defect may lie outside the picture, or under another one, but none comes uncalled.
        assert ids <= set(surfaces._shown(0, index)) | {0}


# --- data sets


def digests(folder: Path) -> dict[str, str]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_dataset(40, 3, tmp_path_factory.mktemp("set") / "metal", size=64)


def test_a_data_set_is_read_as_it_was_drawn(folder):
    data = read_mask_folder(folder, image_size=(56, 56))
    assert data.classes == CLASSES
    assert (data.source, data.synthetic) == ("synthetic (dinotrain surfaces 1, seed 3)", True)
    assert len(data.samples) == 40
    for index in (0, 7):
        sample = render_surface(3, index, 64)
        found = data.samples[index]
        assert found.subject_id == sample.part
        counts = np.bincount(sample.mask.ravel(), minlength=4)
        assert list(found.values.values()) == (counts / sample.mask.size).tolist()
        assert np.array_equal(np.asarray(Image.open(found.images["image"].path)), sample.image)
        assert np.array_equal(np.asarray(Image.open(found.mask.path)), sample.mask)
    splits = [sample.split for sample in data.samples]
    assert {"train", "val", "test"} == set(splits)
    assert splits.count("train") > 25
    with (folder / "split.csv").open() as text:
        assert len(list(csv.DictReader(text))) == 40


def test_masks_are_indexed_with_colours_for_people(folder):
    with Image.open(sorted((folder / "masks").iterdir())[1]) as image:
        assert image.mode == "P"
        assert image.getpalette()[3:6] == list(surfaces._PALETTE[1])


def test_parts_are_shared_by_pictures_of_one_finish():
    parts = {}
    for index in range(40):
        sample = render_surface(3, index, 64, flawless=True)
        parts.setdefault(sample.part, set()).add(sample.finish)
    assert 20 < len(parts) < 36
    assert all(len(finishes) == 1 for finishes in parts.values())


def test_a_set_that_was_cut_off_is_completed_with_the_same_bytes(folder, tmp_path):
    before = digests(folder)
    again = write_dataset(40, 3, tmp_path / "again", size=64)
    assert digests(again) == before
    for name in ("split.csv", "images/surface_000003.png", "masks/surface_000004.png"):
        (again / name).unlink()
    seen = []
    write_dataset(40, 3, again, lambda done, count: seen.append((done, count)), size=64)
    assert digests(again) == before
    assert seen[-1] == (40, 40)
    for options in ({"size": 72}, {}):
        with pytest.raises(DataError, match="does not hold this dataset"):
            write_dataset(39 if not options else 40, 3, again, **({"size": 64} | options))


def test_refusals(tmp_path):
    with pytest.raises(UsageError, match="both must be 0 or more"):
        render_surface(-1, 0)
    with pytest.raises(UsageError, match=f"at least {MIN_SIDE_PX}"):
        render_surface(0, 0, MIN_SIDE_PX - 1)
    with pytest.raises(UsageError, match="15 to 100 mm"):
        render_surface(0, 0, 96, field_mm=10)
    with pytest.raises(UsageError, match="count must be 1 or more"):
        write_dataset(0, 0, tmp_path / "new")
    with pytest.raises(UsageError, match="at least"):
        write_dataset(1, 0, tmp_path / "small", size=8)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file"):
        write_dataset(1, 0, tmp_path / "file")
