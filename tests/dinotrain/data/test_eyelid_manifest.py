"""The manifest reader: what a good file becomes, and every kind of bad row."""

import csv
import json
import math

import numpy as np
import pytest
from PIL import Image

from dinotrain.data.dataset import Dataset, assign_splits, fingerprint
from dinotrain.data.eyelid_manifest import GAZES, OPTIONAL, REQUIRED, read_manifest
from dinotrain.errors import DataError
from dinotrain.tasks import get_task

COLUMNS = (*REQUIRED, *OPTIONAL)


class Folder:
    """A manifest being made: rows are dictionaries, each with a picture of its own."""

    def __init__(self, path):
        self.path = path
        self.rows: list[dict[str, str]] = []
        (path / "images").mkdir()

    def add(self, subject="s1", eye="R", gaze="primary", **cells) -> dict[str, str]:
        name = f"images/{len(self.rows)}.png"
        pixels = np.random.default_rng(len(self.rows)).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(self.path / name)
        row = dict.fromkeys(COLUMNS, "") | {
            "subject_id": subject,
            "eye": eye,
            "gaze": gaze,
            "path": name,
            "mrd1_mm": "3.5",
            "mrd2_mm": "5",
            "lf_mm": "12.25",
            "split": "train",
        }
        self.rows.append(row | cells)
        return self.rows[-1]

    def write(self, columns=COLUMNS, **options):
        file = self.path / "manifest.csv"
        with file.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as text:
            writer = csv.DictWriter(text, columns, extrasaction="ignore", **options)
            writer.writeheader()
            writer.writerows(self.rows)
        return file

    def read(self, path=None, seed=0, **options) -> Dataset:
        return read_manifest(
            path or self.write(), image_size=(28, 28), window_mm=40.0, seed=seed, **options
        )

    def spoil(self, row: dict[str, str]) -> None:
        """Cut a row's picture short behind its header: only decoding tells."""
        path = self.path / row["path"]
        path.write_bytes(path.read_bytes()[:-300])

    def refuses(self, *messages: str, **options) -> str:
        with pytest.raises(DataError) as caught:
            self.read(**options)
        text = str(caught.value)
        for message in messages:
            assert message in text
        return text


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def test_rows_become_one_sample_per_eye(folder):
    for gaze in GAZES:
        folder.add(gaze=gaze)
    folder.add(eye="L", lf_mm="", label_step_mm="0.5", px_per_mm="1.0")
    dataset = folder.read()
    right, left = dataset.samples
    assert (right.subject_id, right.part, right.split) == ("s1", "R", "train")
    assert list(right.images) == list(GAZES)
    assert right.values == {"mrd1": 3.5, "mrd2": 5.0, "lf": 12.25}
    assert list(left.images) == ["primary"]
    assert math.isnan(left.values["lf"])
    assert left.label_step == dataset.label_step() == 0.5
    assert left.images["primary"].px_per_mm == 1.0
    assert dataset.labels(["lf", "mrd1"])[0].tolist() == [12.25, 3.5]
    assert not dataset.synthetic


def test_left_eyes_are_mirrored(folder):
    row = folder.add(eye="L", px_per_mm="1.0")
    folder.add(eye="R", px_per_mm="1.0")
    dataset = read_manifest(folder.write(), image_size=(40, 40), window_mm=40.0)
    pixels = np.array(Image.open(folder.path / row["path"]))
    left, right = dataset.samples
    assert np.array_equal(dataset.load(left.images["primary"]), pixels[:, ::-1])
    second = np.array(Image.open(folder.path / folder.rows[1]["path"]))
    assert np.array_equal(dataset.load(right.images["primary"]), second)


def test_the_task_reads_a_folder_with_bom_and_crlf(folder):
    folder.add()
    folder.write(encoding="utf-8-sig", lineterminator="\r\n")
    dataset = get_task("eyelid").read(folder.path, image_size=(28, 28))
    assert len(dataset.samples) == 1


def test_only_required_columns_and_blank_lines(folder):
    for subject in "abc":
        folder.add(subject)
    file = folder.write(REQUIRED)
    file.write_text(file.read_text().replace("\n", "\n\n"))
    assert len(folder.read(file).samples) == 3


def test_labels_of_any_row_belong_to_the_eye(folder):
    folder.add(lf_mm="")
    folder.add(gaze="up", mrd1_mm="", mrd2_mm="")
    assert folder.read().samples[0].values == {"mrd1": 3.5, "mrd2": 5.0, "lf": 12.25}


def test_blank_splits_are_drawn_by_subject(folder):
    for number in range(20):
        for eye in "LR":
            folder.add(f"s{number}", eye, split="")
    dataset = folder.read()
    owner = {sample.subject_id: sample.split for sample in dataset.samples}
    assert all(owner[s.subject_id] == s.split for s in dataset.samples)
    counts = [list(owner.values()).count(name) for name in ("train", "val", "test")]
    assert counts == [16, 2, 2]
    assert folder.read(seed=0).fingerprint == dataset.fingerprint
    other = {s.subject_id: s.split for s in folder.read(seed=1).samples}
    assert other != owner


def test_a_blank_row_follows_its_subject(folder):
    folder.add(split="test")
    folder.add(gaze="up", split="")
    folder.add("s2")
    assert folder.read().samples[0].split == "test"


def test_assign_splits_never_leaves_validation_empty():
    for count in range(1, 40):
        found = list(assign_splits([f"s{i}" for i in range(count)], 0).values())
        assert len(found) == count
        assert found.count("train") >= count * 0.6
        if count >= 5:
            assert found.count("val") == found.count("test") >= 1


def test_the_fingerprint_follows_content_not_place(folder, tmp_path):
    folder.add()
    folder.add("s2")
    before = folder.read()
    folder.rows.reverse()
    assert folder.read().fingerprint == before.fingerprint
    (folder.path / "images" / "0.png").rename(folder.path / "moved.png")
    folder.rows[1]["path"] = "moved.png"
    assert folder.read().fingerprint == before.fingerprint
    folder.rows[1]["mrd1_mm"] = "3.6"
    assert folder.read().fingerprint != before.fingerprint
    assert fingerprint(before.samples[:1]) != before.fingerprint


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"subject_id": " "}, "subject_id is blank"),
        ({"eye": "left"}, "eye is 'left', not one of L, R"),
        ({"gaze": "sideways"}, "gaze is 'sideways', not one of primary, up, down"),
        ({"split": "training"}, "split is 'training', not one of train, val, test"),
        ({"mrd1_mm": "three"}, "mrd1_mm is 'three', not a number"),
        ({"mrd1_mm": "3,5"}, "write a decimal point"),
        ({"px_per_mm": "nan"}, "px_per_mm is 'nan'; leave it blank"),
        ({"mrd2_mm": "-inf"}, "mrd2_mm is '-inf'; leave it blank"),
        ({"lf_mm": "inf"}, "lf_mm is 'inf'; leave it blank"),
        ({"lf_mm": "122.5"}, "lf_mm is 122.5, the range is 0 up to 32"),
        ({"mrd1_mm": "-6.1"}, "mrd1_mm is -6.1, the range is -6 up to 10"),
        ({"mrd1_mm": "10"}, "mrd1_mm is 10, the range"),
        ({"px_per_mm": "0"}, "px_per_mm is 0, it must be above 0"),
        ({"px_per_mm": "-3"}, "px_per_mm is -3, it must be above 0"),
        ({"px_per_mm": "abc"}, "px_per_mm is 'abc', not a number"),
        ({"px_per_mm": "100"}, "less than half of the 40 mm window"),
        ({"px_per_mm": "0.1"}, "leaves 4.0 pixels"),
        ({"label_step_mm": "0"}, "label_step_mm is 0, it must be above 0"),
        ({"path": ""}, "path is blank"),
        ({"path": "images/none.png"}, "images/none.png: no such picture"),
        ({"path": "../outside.png"}, "leaves the manifest's folder"),
        ({"path": "images/../../outside.png"}, "leaves the manifest's folder"),
        ({"path": "/etc/hostname"}, "leaves the manifest's folder"),
        ({"path": "manifest.csv"}, "not a picture"),
    ],
    ids=str,
)
def test_a_bad_cell(folder, cells, message):
    folder.add()
    folder.add("s2", **cells)
    text = folder.refuses("1 problem:\n  row 3: ", message)
    assert str(folder.path / "images") not in text


def test_every_bad_row_is_reported_then_counted(folder):
    for number in range(14):
        folder.add(f"s{number}", eye="X", mrd1_mm="99")
    text = folder.refuses("28 problems", "row 2: eye is 'X'", "row 6: mrd1_mm", "and 18 more")
    assert "row 7" not in text
    assert len(text.splitlines()) == 12


def test_duplicates(folder):
    folder.add()
    folder.add()
    folder.refuses("row 3: s1/R/primary is already in row 2")


def test_one_picture_under_two_names(folder):
    first = folder.add()
    folder.add("s2", split="test")
    source = (folder.path / first["path"]).read_bytes()
    (folder.path / folder.rows[1]["path"]).write_bytes(source)
    folder.refuses("row 3: the same picture as in row 2")


def test_a_subject_in_two_splits(folder):
    folder.add()
    folder.add(eye="L", split="val")
    folder.refuses("subject 's1' is in 'val' here and in 'train' in row 2")


def test_labels_that_differ_within_an_eye(folder):
    folder.add()
    folder.add(gaze="up", lf_mm="13")
    folder.refuses("row 3: lf_mm is 13 here and 12.25 in row 2")


def test_an_eye_without_primary_gaze(folder):
    folder.add()
    folder.add("s2", gaze="up")
    folder.refuses("1 problem", "row 3: eye s2/R has no picture in primary gaze")
    folder.rows[0]["eye"] = "X"
    assert "no picture in" not in folder.refuses("row 2: eye is 'X'")


def test_a_row_with_too_many_or_too_few_fields(folder):
    folder.add()
    file = folder.write()
    file.write_text(file.read_text() + "s2,R,primary\n" + "a," * 12 + "b\n")
    with pytest.raises(DataError) as caught:
        folder.read(file)
    assert "row 3: has 3 fields, the header has 10" in str(caught.value)
    assert "row 4: has 13 fields" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the manifest is empty"),
        (b"\n\n", "the manifest is empty"),
        (",".join(COLUMNS).encode(), "a header and no rows"),
        (";".join(COLUMNS).encode() + b"\n", "separated by ';'"),
        (b"subject_id,eye\n", "column 'gaze' is missing"),
        ((",".join(COLUMNS) + ",mrd1\n").encode(), "unknown column 'mrd1', meant 'mrd1_mm'?"),
        ((",".join(COLUMNS) + ",eye\n").encode(), "column 'eye' twice"),
        (",".join(COLUMNS).encode() + b'\n"open', "not a CSV"),
        (",".join(COLUMNS).encode() + b"\n\xff\xfe", "not UTF-8"),
        ("subject_id".encode("utf-16"), "not UTF-8"),
    ],
    ids=[
        "empty",
        "blank",
        "header",
        "semicolon",
        "missing",
        "unknown",
        "twice",
        "quote",
        "latin",
        "utf16",
    ],
)
def test_a_file_that_is_no_manifest(folder, content, message):
    file = folder.path / "manifest.csv"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.csv: ") as caught:
        folder.read(file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_manifest(tmp_path):
    with pytest.raises(DataError, match="no such manifest"):
        read_manifest(tmp_path, image_size=(28, 28), window_mm=40.0)


def test_no_train_rows(folder):
    folder.add(split="test")
    folder.refuses("no row is in the split 'train'")


@pytest.mark.parametrize("text", ["", "nan", "NaN"])
def test_a_missing_label_is_masked(folder, text):
    folder.add(lf_mm=text)
    values = folder.read().samples[0].values
    assert math.isnan(values["lf"])
    assert values["mrd1"] == 3.5


# --- pictures that cannot be read


def test_all_rows_whose_picture_cannot_be_read_are_named(folder):
    for number in range(13):
        folder.spoil(folder.add(f"s{number}"))
    folder.rows[0]["mrd1_mm"] = "99"
    text = folder.refuses("14 problems", "row 2: mrd1_mm is 99", "row 2: images/0.png: the picture")
    assert text.count("truncated or damaged") == 9
    assert "and 4 more, of which cannot be read: row 11, row 12, row 13, row 14\n" in text
    assert text.endswith("--skip-unreadable.")


def test_an_eye_keeps_its_other_pictures_or_is_left_out(folder):
    for gaze in GAZES:
        folder.add(gaze=gaze, lf_mm="12.25" if gaze == "up" else "")
    for gaze in GAZES:
        folder.add("s2", gaze=gaze)
    folder.add("s3")
    folder.spoil(folder.rows[1])
    folder.spoil(folder.rows[3])
    folder.rows[6]["path"] = "images/none.png"
    dataset = folder.read(skip_unreadable=True)
    (eye,) = dataset.samples
    assert list(eye.images) == ["primary", "down"]
    # The label stands in the row of the lost picture, and is the eye's.
    assert eye.values["lf"] == 12.25
    up, primary, missing = dataset.skipped
    assert up.startswith("row 3: images/1.png: the picture is truncated")
    assert up.endswith("Eye s1/R keeps its other pictures.")
    assert primary.startswith("row 5: images/3.png")
    assert primary.endswith("Eye s2/R is left out.")
    assert "row 8: images/none.png: no such picture" in missing
    folder.rows = [folder.rows[0], folder.rows[2]]
    folder.rows[0]["lf_mm"] = "12.25"
    assert folder.read().fingerprint == dataset.fingerprint


def test_nothing_else_is_let_through_with_unreadable_pictures(folder):
    folder.add()
    folder.spoil(folder.add("s2", split="val"))
    folder.add("s2", eye="L", split="test", mrd1_mm="-7")
    folder.refuses("1 problem:", "row 4: mrd1_mm is -7", skip_unreadable=True)
    folder.rows[2]["mrd1_mm"] = "3"
    folder.refuses("row 4: subject 's2' is in 'test' here and in 'val'", skip_unreadable=True)
    folder.rows = folder.rows[1:2]
    folder.refuses("no eye is left. row 2: images/1.png", skip_unreadable=True)


def test_progress_counts_pictures(folder):
    for subject in "abc":
        folder.add(subject)
    told = []
    folder.read(progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_subjects_that_differ_in_case_alone_are_noted(folder):
    folder.add("S1")
    folder.add("s1", split="test")
    folder.add("s2")
    (note,) = folder.read().notes
    assert "'S1' and 's1' count as two" in note


def test_synthetic_data_say_so(folder):
    folder.add()
    stamp = folder.path / "dataset.json"
    stamp.write_text(json.dumps({"generator": "eyes 1", "count": 2, "seed": 7}))
    dataset = folder.read()
    assert dataset.synthetic
    assert dataset.source == "synthetic (eyes 1, seed 7)"
    stamp.write_text("[1")
    assert not folder.read().synthetic
