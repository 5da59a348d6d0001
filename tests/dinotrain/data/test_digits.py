"""Digits as a folder per class: the very scans, upright, in stated splits, not called synthetic."""

import shutil

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from dinotrain.data.class_folder import read_class_folder
from dinotrain.data.digits import IMAGE_PX, upscale, write_digits
from dinotrain.errors import DataError


def test_the_reader_finds_all_of_them(digits):
    dataset = read_class_folder(digits, image_size=(56, 56))
    assert dataset.classes == tuple("0123456789")
    assert list(dataset.class_counts().values()) == np.bincount(load_digits().target).tolist()
    counts = {name: len(dataset.split(name).samples) for name in ("train", "val", "test")}
    assert counts == {"train": 1266, "val": 178, "test": 353}
    for name in counts:
        assert min(dataset.split(name).class_counts().values()) >= 17
    assert dataset.source == "scikit-learn's handwritten digits"
    assert not dataset.synthetic


def test_pictures_are_the_scans_of_their_class(digits):
    scans = load_digits()
    files = sorted(digits.glob("*/*/*.png"))
    assert len(files) == len(scans.target)
    for file in files[::97]:
        index = int(file.stem)
        assert file.parent.name == str(scans.target[index])
        picture = np.asarray(Image.open(file))
        assert picture.shape == (IMAGE_PX, IMAGE_PX, 3)
        cell = IMAGE_PX // 8
        means = picture[..., 0].reshape(8, cell, 8, cell).mean(axis=(1, 3))
        # Interpolation moves ink into neighbours; another scan, or a turned one, correlates less.
        found = np.corrcoef(means.ravel(), scans.images[index].ravel())[0, 1]
        turned = np.corrcoef(means.T.ravel(), scans.images[index].ravel())[0, 1]
        assert found > 0.98
        assert turned < found - 0.05


def test_full_ink_is_white():
    assert upscale(np.full((8, 8), 16)).min() == 255
    assert upscale(np.zeros((8, 8)), 32).max() == 0


def test_writing_again_changes_nothing(digits, tmp_path):
    again = tmp_path / "again"
    told = []
    write_digits(again, lambda done, total: told.append((done, total)))
    assert told[-1] == (1797, 1797)
    names = [path.relative_to(again) for path in sorted(again.rglob("*")) if path.is_file()]
    assert len(names) == 1798
    for name in names:
        assert (again / name).read_bytes() == (digits / name).read_bytes()
    # What is missing is written again.
    shutil.rmtree(again / "val")
    write_digits(again)
    assert len(list((again / "val").rglob("*.png"))) == 178


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        write_digits(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
