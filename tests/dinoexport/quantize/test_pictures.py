"""Where calibration pictures come from, and which are refused."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinoexport.quantize.pictures import (
    LEAST_COUNT,
    pixel_digest,
    read_calibration_set,
    read_held_out,
)
from dinoexport.verify.samples import parity_samples
from dinotrain.errors import DataError, UsageError
from dinotrain.tasks import get_task

SIZE = (56, 56)
EYELID = get_task("eyelid")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures without labels."""
    out = tmp_path_factory.mktemp("plain")
    noise = np.random.default_rng(3).integers(0, 256, (10, 64, 80, 3), dtype=np.uint8)
    for index, pixels in enumerate(noise):
        Image.fromarray(pixels).save(out / f"{index}.png")
    return out


def test_without_a_path_the_task_renders_and_the_seed_decides() -> None:
    first = read_calibration_set(EYELID, SIZE, count=8)
    again = read_calibration_set(EYELID, SIZE, count=8)
    other = read_calibration_set(EYELID, SIZE, count=8, seed=1)
    assert first.sha256 == again.sha256 != other.sha256
    assert "rendered" in first.source and "none were given" in first.source
    assert [set(s) for s in first.samples] == [{"primary", "up", "down"}] * 8
    barred = {pixel_digest(x) for s in parity_samples(EYELID, SIZE) for x in s.values()}
    assert not barred & {pixel_digest(x) for s in first.samples for x in s.values()}


def test_pictures_without_labels_serve_all_inputs_in_turn(folder: Path) -> None:
    found = read_calibration_set(EYELID, SIZE, folder, count=9, seed=4)
    assert len(found.samples) == 9 and found.source == folder.name and found.seed == 4
    for this, following in zip(found.samples, found.samples[1:], strict=False):
        assert this["primary"].shape == (*SIZE, 3)
        np.testing.assert_array_equal(this["up"], following["primary"])
        np.testing.assert_array_equal(this["down"], following["up"])


def test_a_list_gives_what_its_folder_gives(folder: Path, tmp_path: Path) -> None:
    listed = tmp_path / "some.txt"
    listed.write_text("\n".join(str(folder / f"{i}.png") for i in range(10)) + "\n\n")
    wanted = read_calibration_set(EYELID, SIZE, folder, seed=2)
    assert read_calibration_set(EYELID, SIZE, listed, seed=2).sha256 == wanted.sha256


def test_of_labelled_data_only_the_training_split_is_taken(tmp_path: Path) -> None:
    noise = np.random.default_rng(8).integers(0, 256, (2, 12, 56, 56, 3), dtype=np.uint8)
    allowed = set()
    for number, name in enumerate(("left", "right")):
        for index, pixels in enumerate(noise[number]):
            split = "train" if index < 6 else ("val", "test")[index % 2]
            path = tmp_path / split / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
            if split == "train":
                allowed.add(pixel_digest(pixels))
    found = read_calibration_set(get_task("classify"), SIZE, tmp_path)
    assert {pixel_digest(s["image"]) for s in found.samples} == allowed
    assert len(found.samples) == 12 and "training split" in found.source


def test_parity_samples_are_refused(tmp_path: Path) -> None:
    samples = parity_samples(EYELID, SIZE)
    barred = {pixel_digest(x) for s in samples for x in s.values()}
    pictures = [x for s in samples for x in s.values()][:9]
    for index, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    assert len(read_calibration_set(EYELID, SIZE, tmp_path).samples) == 9
    with pytest.raises(DataError, match="one of the pictures that parity is judged on"):
        read_calibration_set(EYELID, SIZE, tmp_path, barred=barred)


@pytest.mark.parametrize(("task", "samples"), [("eyelid", 22), ("classify", 64)])
def test_as_many_samples_as_hold_64_pictures_unless_told(task: str, samples: int) -> None:
    found = read_calibration_set(get_task(task), SIZE)
    assert len(found.samples) == samples
    assert 64 <= sum(map(len, found.samples)) < 64 + len(found.samples[0])


@pytest.mark.parametrize(
    ("count", "message"), [(7, "--calibration-count 7 is under 8"), (0, "is under 8")]
)
def test_few_asked_for_are_refused(count: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_calibration_set(EYELID, SIZE, count=count)


def test_few_found_are_refused(folder: Path, tmp_path: Path) -> None:
    listed = tmp_path / "few.txt"
    listed.write_text("\n".join(str(folder / f"{i}.png") for i in range(LEAST_COUNT - 1)))
    with pytest.raises(UsageError, match=f"samples .* {LEAST_COUNT} are needed"):
        read_calibration_set(EYELID, SIZE, listed)
    listed.write_text("")
    with pytest.raises(UsageError, match=": 0 samples"):
        read_calibration_set(EYELID, SIZE, listed)


def test_what_cannot_be_read_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read as a list"):
        read_calibration_set(EYELID, SIZE, tmp_path / "missing.txt")
    with pytest.raises(DataError):
        read_calibration_set(EYELID, SIZE, tmp_path / "nowhere")
    for index in range(9):
        (tmp_path / f"{index}.png").write_bytes((folder / f"{index}.png").read_bytes()[:900])
    with pytest.raises(DataError, match="damaged"):
        read_calibration_set(EYELID, SIZE, tmp_path)


def test_a_picture_of_one_colour_is_refused(folder: Path, tmp_path: Path) -> None:
    for index in range(8):
        (tmp_path / f"{index}.png").write_bytes((folder / f"{index}.png").read_bytes())
    Image.new("RGB", (64, 64), (3, 200, 7)).save(tmp_path / "flat.png")
    with pytest.raises(DataError, match=r"has one colour, \[3, 200, 7\]"):
        read_calibration_set(EYELID, SIZE, tmp_path)


# --- held out ------------------------------------------------------------------------------------


def digests(samples) -> set[str]:
    return {pixel_digest(image) for sample in samples for image in sample.values()}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty pictures without labels."""
    out = tmp_path_factory.mktemp("many")
    noise = np.random.default_rng(4).integers(0, 256, (30, 56, 56, 3), dtype=np.uint8)
    for index, pixels in enumerate(noise):
        Image.fromarray(pixels).save(out / f"{index}.png")
    return out


def test_rendered_pictures_are_held_out_from_rendered_ones() -> None:
    seen = read_calibration_set(EYELID, SIZE, count=8)
    held = read_held_out(EYELID, SIZE, seen, count=8)
    assert len(held.samples) == 8 and held.true is None
    assert not digests(held.samples) & digests(seen.samples)
    assert read_held_out(EYELID, SIZE, seen, count=8).sha256 == held.sha256


def test_of_a_folder_what_calibration_left_is_held_out(many: Path) -> None:
    seen = read_calibration_set(EYELID, SIZE, many, count=10)
    held = read_held_out(EYELID, SIZE, seen, many, count=12)
    # Two of twelve come round to the first pictures again, and are left out.
    assert len(held.samples) == 10 and held.true is None
    assert not digests(held.samples) & digests(seen.samples)


def test_too_few_left_are_refused(many: Path) -> None:
    seen = read_calibration_set(EYELID, SIZE, many, count=25)
    with pytest.raises(UsageError, match=f"{LEAST_COUNT} are needed"):
        read_held_out(EYELID, SIZE, seen, many, count=8)


def test_of_labelled_data_the_test_split_is_held_out_with_its_labels(tmp_path: Path) -> None:
    noise = np.random.default_rng(8).integers(0, 256, (2, 18, 56, 56, 3), dtype=np.uint8)
    wanted = {}
    for number, name in enumerate(("left", "right")):
        for index, pixels in enumerate(noise[number]):
            split = ("train", "val", "test")[index % 3]
            (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / split / name / f"{index}.png")
            if split == "test":
                wanted[pixel_digest(pixels)] = number
    task = get_task("classify")
    seen = read_calibration_set(task, SIZE, tmp_path, count=10)
    held = read_held_out(task, SIZE, seen, tmp_path, count=32)
    assert held.source.endswith("test split")
    found = {
        pixel_digest(s["image"]): int(t[0]) for s, t in zip(held.samples, held.true, strict=True)
    }
    assert found == wanted
