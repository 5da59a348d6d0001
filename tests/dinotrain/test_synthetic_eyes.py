"""The renderer's labels hold in its pictures, its bytes repeat, its datasets are whole."""

import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinotrain.data.synthetic.eyes import COLUMNS, GAZES, EyeSample, render_eye, write_dataset
from dinotrain.data.synthetic.paint import CARUNCLE, PUPIL, SCLERA
from dinotrain.errors import DataError, UsageError

# 12 pixels a millimetre: a margin read off a pixel grid is within half a pixel, 0.042 mm.
SIZE, PX_PER_MM = 480, 12.0
TOLERANCE_MM = 0.5 / PX_PER_MM + 0.005


@pytest.fixture(scope="module")
def eyes() -> list[EyeSample]:
    return [render_eye(3, index, SIZE, 40.0, with_maps=True) for index in range(8)]


def opening_mm(sample: EyeSample, gaze: str) -> tuple[float, float]:
    """Upper and lower end of the open eye in the anchor's column, read off the class map."""
    assert sample.maps is not None
    classes = sample.maps[gaze]
    column = int((sample.marks_mm[gaze]["upper"][0] + 20) * PX_PER_MM)
    rows = np.flatnonzero((classes[:, column] >= SCLERA) & (classes[:, column] <= CARUNCLE))
    return rows[0] / PX_PER_MM - 20, (rows[-1] + 1) / PX_PER_MM - 20


def canthi_y_mm(sample: EyeSample, gaze: str) -> float:
    """Height of the canthi's midpoint, read off the ends of the class map's opening."""
    assert sample.maps is not None
    classes = sample.maps[gaze]
    rows, columns = np.nonzero((classes >= SCLERA) & (classes <= CARUNCLE))
    ends = [rows[columns == end].mean() for end in (columns.min(), columns.max())]
    return float(np.mean(ends) + 0.5) / PX_PER_MM - 20


def measured(sample: EyeSample) -> tuple[float, float, float]:
    reflex_y = sample.marks_mm["primary"]["reflex"][1]
    upper, lower = opening_mm(sample, "primary")
    heights = {gaze: opening_mm(sample, gaze)[0] - canthi_y(sample, gaze) for gaze in GAZES}
    return reflex_y - upper, lower - reflex_y, heights["down"] - heights["up"]


def canthi_y(sample: EyeSample, gaze: str) -> float:
    marks = sample.marks_mm[gaze]
    return (marks["nasal"][1] + marks["temporal"][1]) / 2


def wrong_labels(sample: EyeSample, labels: tuple[float, float, float]) -> list[str]:
    found = zip(("mrd1", "mrd2", "lf"), measured(sample), labels, strict=True)
    # LF is the difference of two readings.
    return [name for name, got, said in found if abs(got - said) > 2 * TOLERANCE_MM]


def labels(sample: EyeSample) -> tuple[float, float, float]:
    return sample.mrd1_mm, sample.mrd2_mm, sample.lf_mm


def test_labels_are_what_the_class_map_shows(eyes: list[EyeSample]) -> None:
    for sample in eyes:
        assert wrong_labels(sample, labels(sample)) == []


@pytest.mark.parametrize("place", [0, 1, 2], ids=["mrd1", "mrd2", "lf"])
def test_a_label_that_is_off_is_noticed(eyes: list[EyeSample], place: int) -> None:
    shifted = list(labels(eyes[0]))
    shifted[place] += 0.2
    assert wrong_labels(eyes[0], (shifted[0], shifted[1], shifted[2])) == [
        ("mrd1", "mrd2", "lf")[place]
    ]


def test_the_reflex_shines_where_the_marks_say(eyes: list[EyeSample]) -> None:
    seen = 0
    for sample in eyes:
        if sample.mrd1_mm < 1.5:
            continue
        x, y = sample.marks_mm["primary"]["reflex"]
        col, row = round((x + 20) * PX_PER_MM), round((y + 20) * PX_PER_MM)
        reach = 14
        patch = sample.images["primary"][row - reach : row + reach, col - reach : col + reach]
        light = patch.astype(float).sum(axis=-1)
        rows, cols = np.nonzero(light > 0.5 * (light.max() + np.median(light)))
        assert abs(rows.mean() + 0.5 - reach) / PX_PER_MM < 0.1  # lens blur and lashes move it
        assert abs(cols.mean() + 0.5 - reach) / PX_PER_MM < 0.1
        seen += 1
    assert seen >= 3


def test_the_lower_margin_is_an_edge_of_the_picture_itself() -> None:
    """The picture, not only its map: the open eye's edge beside the iris is where the map says."""
    errors = []
    for index in range(12):
        sample = render_eye(5, index, SIZE, 40.0, with_maps=True)
        lower = sample.marks_mm["primary"]["lower"]
        column = int((lower[0] + 20) * PX_PER_MM)
        image = sample.images["primary"].astype(float)[:, column - 4 : column + 4].mean(axis=(1, 2))
        edge = round((lower[1] + 20) * PX_PER_MM)
        # Rim and globe differ in light: the steepest step near the margin.
        window = slice(edge - 8, edge + 8)
        errors.append(abs(int(np.argmax(np.abs(np.diff(image[window])))) + 1 - 8) / PX_PER_MM)
    # Noise hides the step in some pictures; in most the edge is within the lens blur (0.16 mm).
    assert np.median(errors) < 0.16


def test_scale_is_image_size_over_window(eyes: list[EyeSample]) -> None:
    for sample in eyes:
        assert sample.px_per_mm == PX_PER_MM
        assert sample.maps is not None
        classes = sample.maps["primary"]
        eye_open = (classes >= SCLERA) & (classes <= CARUNCLE)
        columns = np.flatnonzero(eye_open.any(axis=0))
        marks = sample.marks_mm["primary"]
        wide = abs(marks["nasal"][0] - marks["temporal"][0])
        # The opening narrows to nothing at the canthi, where its last columns vanish.
        assert wide - 1.0 < (columns[-1] - columns[0]) / sample.px_per_mm <= wide


def test_the_canthi_lie_about_the_centre(eyes: list[EyeSample]) -> None:
    for sample in eyes:
        for gaze in GAZES:
            nasal, temporal = sample.marks_mm[gaze]["nasal"], sample.marks_mm[gaze]["temporal"]
            assert abs(nasal[0] + temporal[0]) / 2 <= 1.0
            assert abs(nasal[1] + temporal[1]) / 2 <= 1.0
        # The tapering ends of the opening are near the canthi while the lids are apart.
        found = canthi_y_mm(sample, "primary")
        assert abs(found - canthi_y(sample, "primary")) < 0.6


def test_left_eyes_are_mirrored(eyes: list[EyeSample]) -> None:
    assert {sample.eye for sample in eyes} == {"L", "R"}
    for sample in eyes:
        assert sample.maps is not None
        _, columns = np.nonzero(sample.maps["primary"] == CARUNCLE)
        assert (columns.mean() > SIZE / 2) == (sample.eye == "R")
        assert (sample.marks_mm["primary"]["nasal"][0] > 0) == (sample.eye == "R")


def test_same_seed_same_bytes_other_seed_other_bytes() -> None:
    first, again, other = render_eye(0, 4), render_eye(0, 4), render_eye(1, 4)
    for gaze in GAZES:
        assert first.images[gaze].dtype == np.uint8
        assert first.images[gaze].shape == (224, 224, 3)
        assert first.images[gaze].tobytes() == again.images[gaze].tobytes()
        assert first.images[gaze].tobytes() != other.images[gaze].tobytes()
    assert labels(first) == labels(again) != labels(other)
    assert first.maps is None


def test_labels_spread_over_their_ranges() -> None:
    found = np.array([labels(render_eye(9, index, 32)) for index in range(150)])
    for column, (low, high) in enumerate([(-1.5, 6), (3, 8), (2, 18)]):
        values = found[:, column]
        assert values.min() >= low and values.max() <= high
        assert np.ptp(values) > 0.75 * (high - low)


def test_the_pupil_is_dark_and_the_sclera_light() -> None:
    sample = next(s for i in range(20) if (s := render_eye(2, i, with_maps=True)).mrd1_mm > 3)
    assert sample.maps is not None
    image, classes = sample.images["primary"].astype(float).mean(axis=-1), sample.maps["primary"]
    assert np.median(image[classes == PUPIL]) + 60 < np.median(image[classes == SCLERA])


@pytest.mark.parametrize(
    ("seed", "index", "size", "window"),
    [(-1, 0, 224, 40.0), (0, -1, 224, 40.0), (0, 0, 8, 40.0), (0, 0, 224, 5.0)],
)
def test_arguments_that_cannot_work_are_refused(
    seed: int, index: int, size: int, window: float
) -> None:
    with pytest.raises(UsageError):
        render_eye(seed, index, size, window)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def read_rows(manifest: Path) -> list[dict[str, str]]:
    with manifest.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_dataset_is_whole_and_its_bytes_repeat(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    manifest = write_dataset(9, 5, tmp_path / "a", lambda done, all_: steps.append((done, all_)))
    rows = read_rows(manifest)
    assert steps == [(done, 9) for done in range(1, 10)]
    assert len(rows) == 27
    assert tuple(rows[0]) == COLUMNS
    subjects = {
        name: {r["subject_id"] for r in rows if r["split"] == name}
        for name in ("train", "val", "test")
    }
    assert all(subjects.values())
    assert sum(len(s) for s in subjects.values()) == len(set().union(*subjects.values()))
    assert {row["eye"] for row in rows} == {"L", "R"}
    for row in rows:
        with Image.open(tmp_path / "a" / row["path"]) as image:
            # The picture shows more than the 40 mm that a reader cuts out.
            assert image.size[0] / float(row["px_per_mm"]) > 42
    before = digests(tmp_path / "a")
    assert len(before) == 29
    write_dataset(9, 5, tmp_path / "a")
    write_dataset(9, 5, tmp_path / "b")
    assert digests(tmp_path / "a") == digests(tmp_path / "b") == before


def test_a_run_cut_off_leaves_no_manifest_and_can_go_on(tmp_path: Path) -> None:
    def cut(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(3, 1, tmp_path / "set", cut)
    assert not (tmp_path / "set" / "manifest.csv").exists()
    manifest = write_dataset(3, 1, tmp_path / "set")
    assert all((tmp_path / "set" / row["path"]).is_file() for row in read_rows(manifest))


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        write_dataset(1, 0, tmp_path)
    write_dataset(1, 0, tmp_path / "set")
    with pytest.raises(DataError, match="not empty"):
        write_dataset(1, 1, tmp_path / "set")
    with pytest.raises(DataError, match="is a file"):
        write_dataset(1, 0, tmp_path / "note.txt")
