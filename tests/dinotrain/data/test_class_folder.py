"""A folder per class: classes by name, splits without leaks, problems named in one go."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinotrain.data.class_folder import read_class_folder
from dinotrain.data.synthetic.gazes import render_gaze, write_dataset
from dinotrain.errors import DataError, UsageError
from dinotrain.tasks import get_task

SIZE = (56, 56)


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve dogs, eight cats, and things that are no pictures."""
    for index in range(20):
        name = "dog" if index < 12 else "cat"
        picture(tmp_path / name / "deep" / f"{index}.png", index)
    (tmp_path / ".git").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    (tmp_path / "cat" / "._1.png").write_text("litter")
    return tmp_path


def read(path: Path, seed: int = 0, **options):
    return read_class_folder(path, image_size=SIZE, seed=seed, **options)


def test_classes_are_numbered_by_name(folder):
    dataset = read(folder)
    assert dataset.classes == ("cat", "dog")
    assert dataset.class_counts() == {"cat": 8, "dog": 12}
    for sample in dataset.samples:
        assert sample.part.startswith(dataset.classes[int(sample.values["class"])])
        assert dataset.load(sample.images["image"]).shape == (*SIZE, 3)


def test_splits_show_every_class_and_repeat(folder):
    dataset = read(folder)
    for name in ("train", "val", "test"):
        assert min(dataset.split(name).class_counts().values()) >= 1
    assert read(folder) == dataset
    assert read(folder, seed=1).fingerprint != dataset.fingerprint
    # The same pictures elsewhere are the same data.
    moved = folder.rename(folder.with_name("moved"))
    assert read(moved).fingerprint == dataset.fingerprint


def test_a_picture_that_lies_there_twice_is_in_one_split(folder):
    for index in range(12):
        source = folder / "dog" / "deep" / f"{index}.png"
        (folder / "dog" / f"copy-{index}.png").write_bytes(source.read_bytes())
    dataset = read(folder)
    splits = {}
    for sample in dataset.samples:
        assert splits.setdefault(sample.subject_id, sample.split) == sample.split
    assert len(splits) == 20 < len(dataset.samples)


def test_given_splits_are_kept(tmp_path):
    for index, (split, name) in enumerate(
        (s, n) for s in ("train", "validation", "test") for n in ("a", "b") for _ in range(3)
    ):
        picture(tmp_path / split / name / f"{index}.jpg", index)
    dataset = read(tmp_path, seed=5)
    assert {s.part.split("/")[0]: s.split for s in dataset.samples} == {
        "train": "train",
        "validation": "val",
        "test": "test",
    }


def test_a_class_may_be_called_test(tmp_path):
    for index in range(8):
        picture(tmp_path / ("test" if index % 2 else "train") / f"{index}.png", index)
    assert read(tmp_path).classes == ("test", "train")


def refusal(path: Path, **options) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **options)
    return str(caught.value)


def test_what_is_no_data_set(folder, tmp_path):
    assert "no such folder" in refusal(tmp_path / "missing")
    assert "no such folder" in refusal(folder / "cat" / "notes.txt")
    assert "0 classes; two or more are needed" in refusal(folder / "cat" / "deep")
    (tmp_path / "one" / "a").mkdir(parents=True)
    assert "1 classes" in refusal(tmp_path / "one")


def test_problems_are_listed_together(folder):
    (folder / "bird").mkdir()
    (folder / "cat" / "broken.png").write_bytes(b"no picture")
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(folder / "cat" / "deep16.png")
    source = folder / "dog" / "deep" / "0.png"
    (folder / "cat" / "dog.png").write_bytes(source.read_bytes())
    error = refusal(folder)
    for part in ("class 'bird' has no picture", "broken.png", "deep16.png", "of two classes"):
        assert part in error
    assert "cat/dog.png" in error
    assert "dog/deep/0.png" in error


def test_ten_problems_are_told_and_all_that_cannot_be_read_are_named(folder):
    for index in range(14):
        (folder / "cat" / f"bad{index:02}.png").write_bytes(b"x")
    error = refusal(folder)
    assert error.startswith(f"{folder}: 14 problems:")
    assert error.count("not a picture") == 10
    tail = "and 4 more, of which cannot be read: "
    assert tail + ", ".join(f"cat/bad{index}.png" for index in range(10, 14)) in error
    assert error.endswith("--skip-unreadable.")


def test_unreadable_pictures_can_be_left_out_but_nothing_else(folder):
    whole = read(folder)
    broken = folder / "dog" / "deep" / "3.png"
    # Whole by its header: only decoding tells.
    broken.write_bytes(broken.read_bytes()[:-300])
    (folder / "cat" / "bad.png").write_bytes(b"x")
    assert "2 problems" in refusal(folder)
    dataset = read(folder, skip_unreadable=True)
    assert len(dataset.samples) == len(whole.samples) - 1
    assert [text.split(":")[0] for text in dataset.skipped] == ["cat/bad.png", "dog/deep/3.png"]
    assert "truncated" in dataset.skipped[1]
    broken.unlink()
    (folder / "cat" / "bad.png").unlink()
    # What was used is what the fingerprint is of.
    assert read(folder).fingerprint == dataset.fingerprint != whole.fingerprint
    for file in (folder / "cat").rglob("*.png"):
        file.write_bytes(b"")
    assert "class 'cat' has no picture that can be read" in refusal(folder, skip_unreadable=True)


def test_copies_and_small_classes_are_noted(folder):
    source = folder / "dog" / "deep" / "0.png"
    (folder / "dog" / "again.png").write_bytes(source.read_bytes())
    for index in range(120):
        picture(folder / "fox" / f"{index}.png", 100 + index)
    dataset = read(folder)
    assert dataset.notes == (
        "1 picture is copies of others, such as dog/deep/0.png of dog/again.png; copies stay in "
        "one split",
    )
    notes = get_task("classify").summarise(dataset).notes
    train = dataset.split("train").class_counts()
    assert notes[1:] == (
        f"class 'cat' has {train['cat']} training samples: less than a tenth of 'fox' "
        f"({train['fox']}), and fewer than 10",
    )
    assert train["dog"] >= 10


def test_a_class_without_samples_in_a_split_is_noted(tmp_path):
    for index, name in enumerate(("train/a", "train/b", "val/a", "val/b", "test/a")):
        picture(tmp_path / name / "1.png", index)
    assert read(tmp_path).notes == ("class 1 'b' is empty in test",)


def test_a_picture_in_two_given_splits_is_refused(tmp_path):
    for index, name in enumerate(("train/a", "train/b", "test/a", "test/b")):
        picture(tmp_path / name / "1.png", index % 3)
    assert "in two splits" in refusal(tmp_path)
    (tmp_path / "extra" / "sub").mkdir(parents=True)
    assert "'extra' lies beside" in refusal(tmp_path)


# --- rendered gazes ------------------------------------------------------------------------------


def test_the_reader_reads_what_the_renderer_writes(tmp_path):
    out = get_task("classify").synthesise(33, 4, tmp_path / "gazes")
    dataset = read(out)
    assert dataset.classes == ("down", "primary", "up")
    assert dataset.class_counts() == {"down": 11, "primary": 11, "up": 11}
    assert dataset.synthetic
    assert dataset.source == "synthetic (dinotrain gazes 1, seed 4)"
    for sample in dataset.samples:
        # The two eyes of a pair may be one person's.
        pair = {s.split for s in dataset.samples if _pair(s) == _pair(sample)}
        assert len(pair) == 1
    before = {p.name: p.read_bytes() for p in out.rglob("*.png")}
    write_dataset(33, 4, out)
    assert {p.name: p.read_bytes() for p in out.rglob("*.png")} == before
    image, gaze = render_gaze(4, 5)
    assert gaze == "down"
    np.testing.assert_array_equal(np.asarray(Image.open(next(out.rglob("000005.png")))), image)


def _pair(sample) -> int:
    return int(Path(sample.part).stem) // 2


@pytest.mark.parametrize(("count", "seed"), [(29, 0), (0, 0), (33, -1)])
def test_counts_that_cannot_be_rendered(tmp_path, count, seed):
    with pytest.raises(UsageError, match="count must be 30 or more"):
        write_dataset(count, seed, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_of_something_else_is_left_alone(folder):
    with pytest.raises(DataError, match="is not empty"):
        write_dataset(33, 0, folder)
    assert not (folder / "dataset.json").exists()
