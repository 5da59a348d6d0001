"""The reader of pictures with masks: what it gives, how it splits, and all that it refuses."""

import hashlib
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from dinotrain.data.dataset import (
    SPLITS,
    ImageRef,
    MaskRef,
    Sample,
    fingerprint,
    load_mask,
    share_names,
    stratified_splits,
)
from dinotrain.data.mask_folder import read_mask_folder
from dinotrain.data.masks import IGNORE
from dinotrain.errors import DataError
from dinotrain.tasks import get_task

CLASSES = ("Background", "Dust", "Scratch")
SIZE = (48, 40)


def write_pair(folder, stem, ids, rng):
    picture = rng.integers(0, 256, (*ids.shape, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "images" / f"{stem}.jpg", quality=90)
    Image.fromarray(ids).save(folder / "masks" / f"{stem}.png")
    return picture


@pytest.fixture
def folder(tmp_path):
    """Return a data set of 20 pictures: every second one clean, every fourth with a scratch."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    rng = np.random.default_rng(0)
    for number in range(20):
        ids = np.zeros(SIZE, dtype=np.uint8)
        if number % 2:
            ids[10:20, 10:14] = 1
        if number % 4 == 1:
            ids[30, 5:35] = 2
        ids[0, :5] = IGNORE
        write_pair(tmp_path, f"p{number:02}", ids, rng)
    return tmp_path


def read(folder, **options):
    return read_mask_folder(folder, image_size=(28, 28), **options)


def refusal(folder, **options) -> str:
    with pytest.raises(DataError) as caught:
        read(folder, **options)
    return str(caught.value)


def set_ids(folder, stem, ids):
    Image.fromarray(np.asarray(ids, dtype=np.uint8)).save(folder / "masks" / f"{stem}.png")


def test_reads_samples_with_the_shares_of_their_classes(folder):
    data = read(folder)
    assert data.classes == CLASSES
    assert [s.part for s in data.samples] == [f"p{n:02}" for n in range(20)]
    assert [s.name for s in data.samples[:1]] == ["p00/p00"]
    first, second = data.samples[0], data.samples[1]
    labelled = SIZE[0] * SIZE[1] - 5
    assert list(first.values) == ["share of Background", "share of Dust", "share of Scratch"]
    assert list(first.values.values()) == [1, 0, 0]
    wanted = [(labelled - 70) / labelled, 40 / labelled, 30 / labelled]
    assert list(second.values.values()) == pytest.approx(wanted)
    mask, image = second.mask, second.images["image"]
    assert mask.digest == hashlib.sha256(mask.path.read_bytes()).hexdigest()
    assert image.digest == hashlib.sha256(image.path.read_bytes()).hexdigest()
    assert data.labels(share_names(CLASSES)).shape == (20, 3)
    assert data.class_counts() == {"Background": 20, "Dust": 10, "Scratch": 5}
    assert data.class_shares()["Dust"] == pytest.approx(400 / (20 * labelled))
    assert data.source == folder.name
    assert not data.synthetic


def test_a_mask_without_labels_is_no_label(folder):
    set_ids(folder, "p01", np.full(SIZE, IGNORE))
    data = read(folder)
    shares = data.labels(share_names(CLASSES))
    assert np.isnan(shares[1]).all()
    assert np.isfinite(np.delete(shares, 1, axis=0)).all()
    assert data.class_counts()["Scratch"] == 4
    assert sum(data.class_shares().values()) == pytest.approx(1)


def test_loads_a_pair_at_the_models_size(folder):
    data = read(folder)
    picture = data.load(data.samples[1].images["image"])
    mask = load_mask(data.samples[1].mask, data.image_size)
    assert (picture.shape, picture.dtype) == ((28, 28, 3), np.uint8)
    assert (mask.shape, mask.dtype) == ((28, 28), np.uint8)
    # 40 of 48 rows remain, in 28: rows 10 to 20 of the file are rows 4.2 to 11.2.
    assert np.flatnonzero((mask == 1).any(axis=1))[[0, -1]].tolist() == [4, 10]


def test_the_fingerprint_knows_content_and_nothing_else(folder, tmp_path_factory):
    before = read(folder)
    moved = tmp_path_factory.mktemp("moved") / "elsewhere"
    moved.mkdir()
    for name in ("images", "masks", "classes.txt"):
        (folder / name).rename(moved / name)
    assert read(moved).fingerprint == before.fingerprint
    # Another way to write the same names.
    (moved / "classes.txt").unlink()
    (moved / "classes.json").write_text(json.dumps(CLASSES))
    assert read(moved).fingerprint == before.fingerprint
    (moved / "classes.json").write_text(json.dumps(["Background", "Dust", "Crack"]))
    renamed = read(moved).fingerprint
    assert renamed != before.fingerprint
    # Both classes are empty, and still are two classes.
    empty = [fingerprint(before.samples, names) for names in (("a", "b"), ("b", "a"), ())]
    assert len(set(empty)) == 3
    ids = np.zeros(SIZE)
    ids[3, 3] = 1
    set_ids(moved, "p00", ids)
    assert read(moved).fingerprint not in (before.fingerprint, renamed)


def test_a_mask_changes_the_fingerprint_and_its_absence_does_not():
    sample = Sample(
        subject_id="a",
        part="L",
        split="train",
        images={"image": ImageRef(path=Path("x"), digest="0" * 64, px_per_mm=7.5, window_mm=40.0)},
        values={"mrd1": 1.5},
        label_step=0.1,
    )
    plain = fingerprint((sample,))
    # What it was before samples could have masks: trained checkpoints name it.
    assert plain == "0effeb1f290050020c9ecc5160b6932ad0239cf06ec9fbbb340ef0a20fb75add"
    one, other = (
        msgspec.structs.replace(sample, mask=MaskRef(path=Path("m"), digest=digit * 64))
        for digit in "12"
    )
    assert len({plain, fingerprint((one,)), fingerprint((other,))}) == 3


# --- splits


def test_split_is_stratified_seeded_and_by_group():
    strata = {f"g{n:03}": ((), (1,), (2,), (1, 2))[n % 4] for n in range(200)}
    splits = stratified_splits(strata, seed=0)
    for split in ("val", "test"):
        chosen = [strata[g] for g, s in splits.items() if s == split]
        assert len(chosen) == 20
        # 50 of 200 groups show each combination: 5 of 20, and one more or less at its ends.
        for shown in set(strata.values()):
            assert abs(chosen.count(shown) - 5) <= 1
    assert splits == stratified_splits(dict(reversed(strata.items())), seed=0)
    assert splits != stratified_splits(strata, seed=1)


def test_few_groups_and_the_least_that_are_split():
    for count in range(1, 30):
        splits = list(stratified_splits({str(n): () for n in range(count)}, 0).values())
        counts = [splits.count(s) for s in SPLITS]
        assert sum(counts) == count
        if count < 5:
            assert counts == [count, 0, 0]
        else:
            assert counts[1] == counts[2] == max(1, round(count / 10))


def test_groups_stay_together_and_named_splits_hold(folder):
    rows = ["stem,group,split"]
    for number in range(20):
        # Pairs share a group; of each named group only one row says so.
        named = {0: "test", 2: "val"}.get(number, "")
        rows.append(f"p{number:02},part{number // 2},{named}")
    (folder / "split.csv").write_text("\n".join(rows))
    data = read(folder)
    where = {}
    for sample in data.samples:
        where.setdefault(sample.subject_id, set()).add(sample.split)
    assert all(len(splits) == 1 for splits in where.values())
    assert where["part0"] == {"test"}
    assert where["part1"] == {"val"}
    assert data.split("test").fingerprint == data.fingerprint
    assert {s.split for s in data.split("val", "test").samples} == {"val", "test"}
    (folder / "split.csv").write_text(
        "\n".join(["stem,split", *(f"p{n:02},val" for n in range(20))])
    )
    assert "no picture is in the split 'train'" in refusal(folder)


def test_split_csv_refusals(folder):
    (folder / "split.csv").write_text(
        "\n".join(
            [
                "stem,group,split",
                "p00,a,train",
                "p01,a,test",
                "p02,b,training",
                "p02,b,train",
                ",b,train",
                "p03.jpg,b,train",
                "p99,b,train",
                *(f"p{n:02},," for n in range(4, 20)),
            ]
        )
    )
    text = refusal(folder)
    assert text.startswith(f"{folder}: 7 problems:")
    for part in (
        "split.csv row 3: group 'a' is in 'test' here and in 'train' in row 2",
        "split.csv row 4: split is 'training', not one of train, val, test",
        "split.csv row 5: stem 'p02' twice",
        "split.csv row 6: stem is blank",
        "split.csv row 7: no picture of the stem 'p03.jpg'; write 'p03'",
        "split.csv row 8: no picture of the stem 'p99'",
        "split.csv: no row for the stem 'p03'",
    ):
        assert part in text
    for header in ("stem", "name,split", "stem,group,fold"):
        (folder / "split.csv").write_text(header + "\n")
        assert "stem and one or both of group and split are accepted" in refusal(folder)
    (folder / "split.csv").write_text("stem,split\np00,train,x\n")
    assert "row 2 has 3 fields, the header has 2" in refusal(folder)


# --- bad files


def test_all_problems_are_listed_by_file(folder):
    set_ids(folder, "p00", np.full((40, 48), 0))
    ids = np.zeros(SIZE)
    ids[0, :3], ids[1, :7] = 7, 9
    set_ids(folder, "p01", ids)
    (folder / "masks" / "p02.png").unlink()
    (folder / "images" / "p03.jpg").unlink()
    (folder / "images" / "p04.jpg").write_bytes(b"no picture at all, just text")
    (folder / "images" / "p05.jpg").write_bytes((folder / "images" / "p06.jpg").read_bytes())
    (folder / "images" / "p07.png").write_bytes(b"")
    (folder / "masks" / "more").mkdir()
    data = (folder / "masks" / "p08.png").read_bytes()
    (folder / "masks" / "p08.png").write_bytes(data[:-40])
    (folder / "images" / "Thumbs.db").write_bytes(b"x")
    (folder / "masks" / ".DS_Store").write_bytes(b"x")
    text = refusal(folder)
    assert text.startswith(f"{folder}: 9 problems:")
    for part in (
        "masks/p00.png: 48×40 pixels, its picture p00.jpg has 40×48 (is it turned?)",
        "masks/p01.png: holds 7 (3 pixels), 9 (7 pixels); 0 to 2 and 255 (ignore) are accepted",
        "images/p02.jpg: no mask masks/p02.png",
        "masks/p03.png: no picture of the stem 'p03' in images/",
        "images/p04.jpg: not a picture, or a damaged one",
        "images/p06.jpg: the same picture as images/p05.jpg",
        "images/p07.png: the stem 'p07' is also that of p07.jpg",
        "masks/p08.png: the mask is truncated or damaged",
        "masks/more: a folder",
        "--skip-unreadable",
    ):
        assert part in text, part


def test_only_ten_are_shown(folder):
    for number in range(12):
        (folder / "masks" / f"p{number:02}.png").unlink()
    text = refusal(folder)
    assert "12 problems" in text
    assert text.count("no mask masks/") == 10
    assert "and 2 more" in text
    assert "skip" not in text


def test_unreadable_pairs_can_be_skipped_but_nothing_else(folder):
    path = folder / "images" / "p04.jpg"
    path.write_bytes(path.read_bytes()[:200])
    (folder / "masks" / "p08.png").write_bytes(b"")
    assert "2 problems" in refusal(folder)
    data = read(folder, skip_unreadable=True)
    assert len(data.samples) == 18
    assert [text.split(":")[0] for text in data.skipped] == ["images/p04.jpg", "masks/p08.png"]
    assert (
        data.skipped
        == get_task("segment").read(folder, image_size=(24, 24), skip_unreadable=True).skipped
    )
    set_ids(folder, "p01", np.full(SIZE, 77))
    text = refusal(folder, skip_unreadable=True)
    assert "1 problem:" in text
    assert "holds 77" in text
    for file in (folder / "images").iterdir():
        file.write_bytes(b"")
    assert "no picture is left" in refusal(folder, skip_unreadable=True)


def test_masks_of_0_and_255_alone_are_refused(folder):
    for number in range(20):
        ids = np.zeros(SIZE)
        ids[number, 3:9] = 255
        set_ids(folder, f"p{number:02}", ids)
    assert "the masks hold 0 and 255 only, and 255 means ignore" in refusal(folder)


def test_empty_classes_are_noted(folder):
    (folder / "classes.txt").write_text("Background\nDust\nScratch\nRundown")
    set_ids(folder, "p06", np.full(SIZE, IGNORE))
    rows = ["stem,split", *(f"p{n:02},{'val' if n in (0, 4) else 'train'}" for n in range(20))]
    (folder / "split.csv").write_text("\n".join(rows))
    assert read(folder).notes == (
        "masks/p06.png: no pixel has a label",
        "class 1 'Dust' is empty in val",
        "class 2 'Scratch' is empty in val",
        "class 3 'Rundown' is empty: no sample shows it",
    )


def test_folder_refusals(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    assert "no folder 'images' in it" in refusal(empty)
    (empty / "images").mkdir()
    assert "no folder 'masks' in it" in refusal(empty)
    (empty / "masks").mkdir()
    assert "no list of classes" in refusal(empty)
    (empty / "classes.txt").write_text("a\nb")
    assert "images/ and masks/ are empty" in refusal(empty)
    (empty / "classes.json").write_text("[]")
    assert "keep one" in refusal(empty)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("txt", "Background", "1 classes; 2 to 255"),
        ("txt", "\n".join(map(str, range(256))), "256 classes"),
        ("txt", "a\n\nb", "the name of class 1 is ''"),
        ("txt", "a\nb\na", "'a' names both class 0 and class 2"),
        ("json", "{", "not JSON"),
        ("json", '["a", 3]', "a list of names is accepted"),
        ("json", '"ab"', "a list of names is accepted"),
        ("json", '{"0": "a", "2": "b"}', "without a gap"),
    ],
)
def test_class_lists_that_are_refused(folder, name, text, message):
    (folder / "classes.txt").unlink()
    (folder / f"classes.{name}").write_text(text)
    assert message in refusal(folder)


def test_json_classes_by_id(folder):
    (folder / "classes.txt").unlink()
    (folder / "classes.json").write_text('{"1": "Dust", "0": "Background", "2": "Scratch"}')
    assert read(folder).classes == CLASSES


def test_a_generators_stamp_marks_synthetic_data(folder):
    (folder / "dataset.json").write_text('{"generator": "x 1", "seed": 3}')
    data = read(folder)
    assert (data.source, data.synthetic) == ("synthetic (x 1, seed 3)", True)


def test_progress_and_warning_filters(folder):
    import warnings

    before = list(warnings.filters)
    seen = []
    read(folder, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 20) for n in range(1, 21)]
    assert warnings.filters == before
