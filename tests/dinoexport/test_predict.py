"""predict: the pixels that reach the artifact, the numbers that come back, and where they stand."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from dinoexport.bundle import open_bundle
from dinoexport.predict import Prediction, _parse, input_size, predict_files
from dinotrain.errors import UsageError
from dinotrain.tasks import get_task
from dinotrain.tasks.eyelid_drawing import _COLOURS, PANEL_PX

pytestmark = pytest.mark.e2e
GAZES = ("primary", "up", "down")
SIDE = 56
WINDOW_MM = 40.0


@pytest.fixture
def bundle(built: Callable[[str, str], Path]) -> Path:
    return built("onnx", "fp32")


def pictures(seed: int, height: int, width: int) -> dict[str, np.ndarray]:
    """Smooth pictures, one colour cast each, so that resizing keeps what they show."""
    rng = np.random.default_rng(seed)
    found = {}
    for gaze in GAZES:
        small = rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)
        large = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        found[gaze] = np.asarray(large)
    return found


def stored(images: dict[str, np.ndarray], folder: Path) -> list[str]:
    folder.mkdir(exist_ok=True)
    arguments = []
    for name, image in images.items():
        Image.fromarray(np.ascontiguousarray(image)).save(folder / f"{name}.png")
        arguments.append(f"{name}={folder / name}.png")
    return arguments


def plain(bundle: Path, images: dict[str, np.ndarray]) -> dict[str, float]:
    """Outputs of a session of our own on pictures of the input size."""
    session = onnxruntime.InferenceSession(str(open_bundle(bundle).artifact))
    names = [output.name for output in session.get_outputs()]
    feeds = {n: np.ascontiguousarray(i)[None] for n, i in images.items()}
    return {n: float(v[0]) for n, v in zip(names, session.run(names, feeds), strict=True)}


def apart(one: dict[str, float], two: dict[str, float]) -> float:
    assert one.keys() == two.keys()
    return max(abs(one[name] - two[name]) for name in one)


# One file, two sessions: threads may sum in another order.
SAME_MM = 1e-4


# --- pixels --------------------------------------------------------------------------------------


def test_pictures_of_the_input_size_are_passed_as_they_are(bundle, tmp_path):
    images = pictures(1, SIDE, SIDE)
    found = predict_files(bundle, stored(images, tmp_path))
    assert apart(found.outputs, plain(bundle, images)) < SAME_MM
    # A change of two grey levels would show.
    brighter = {n: np.clip(i, 0, 253) + np.uint8(2) for n, i in images.items()}
    assert apart(found.outputs, plain(bundle, brighter)) > 10 * SAME_MM


@pytest.mark.parametrize("eye", ["L", "l"])
def test_a_mirrored_left_eye_gives_the_right_ones_numbers(bundle, tmp_path, eye):
    """No pixel is resampled, so nothing but the mirror is in it."""
    images = pictures(2, SIDE, SIDE)
    mirrored = {name: image[:, ::-1] for name, image in images.items()}
    right = predict_files(bundle, stored(images, tmp_path / "right"))
    left = predict_files(bundle, stored(mirrored, tmp_path / "left"), left_eye=eye)
    assert apart(left.outputs, right.outputs) < SAME_MM
    unmirrored = predict_files(bundle, stored(mirrored, tmp_path / "left"), left_eye="r")
    assert apart(unmirrored.outputs, right.outputs) > 10 * SAME_MM


def resized_then_cropped(
    images: dict[str, np.ndarray], size: tuple[int, int], left: int, top: int
) -> dict[str, np.ndarray]:
    """The other order: the whole picture to (width, height), then whole pixels of the result."""
    box = (left, top, left + SIDE, top + SIDE)
    return {
        name: np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC).crop(box))
        for name, image in images.items()
    }


def test_scale_crops_the_window_around_the_centre(bundle, tmp_path):
    """5 px per mm: 40 mm are 200 pixels and become 56, so the picture's 300×250 become 84×70."""
    images = pictures(3, 250, 300)
    found = predict_files(bundle, stored(images, tmp_path), px_per_mm=5.0)
    by_hand = resized_then_cropped(images, (84, 70), left=14, top=7)
    assert apart(found.outputs, plain(bundle, by_hand)) < SAME_MM
    # One pixel beside, or a tenth of the scale more, is another measurement.
    beside = resized_then_cropped(images, (84, 70), left=15, top=7)
    assert apart(found.outputs, plain(bundle, beside)) > 10 * SAME_MM
    other = predict_files(bundle, stored(images, tmp_path), px_per_mm=5.5)
    assert apart(found.outputs, other.outputs) > 10 * SAME_MM


def test_what_a_picture_does_not_cover_is_black(bundle, tmp_path):
    """150 of 200 pixels: 42 of the 56 that the model reads, with 7 black on each side."""
    images = pictures(4, 150, 150)
    found = predict_files(bundle, stored(images, tmp_path), px_per_mm=5.0)
    by_hand = {}
    for name, image in images.items():
        canvas = Image.new("RGB", (SIDE, SIDE))
        canvas.paste(Image.fromarray(image).resize((42, 42), Image.Resampling.BICUBIC), (7, 7))
        by_hand[name] = np.asarray(canvas)
    assert apart(found.outputs, plain(bundle, by_hand)) < SAME_MM


def test_without_scale_the_largest_centred_square_is_the_window(bundle, tmp_path):
    images = pictures(5, 120, 180)
    found = predict_files(bundle, stored(images, tmp_path))
    by_hand = resized_then_cropped(images, (84, 56), left=14, top=0)
    assert apart(found.outputs, plain(bundle, by_hand)) < SAME_MM


def test_a_left_eye_is_cropped_as_a_right_one(bundle, tmp_path):
    images = pictures(6, 260, 300)
    mirrored = {name: image[:, ::-1] for name, image in images.items()}
    right = predict_files(bundle, stored(images, tmp_path / "right"), px_per_mm=5.0)
    left = predict_files(bundle, stored(mirrored, tmp_path / "left"), left_eye="L", px_per_mm=5.0)
    # Bicubic resampling is symmetric but for rounding to whole grey levels.
    assert apart(left.outputs, right.outputs) < 0.01


@pytest.mark.parametrize("target", ["tflite", "coreml"])
def test_every_target_gets_the_same_pixels(bundle, built, tmp_path, target):
    arguments = stored(pictures(7, 260, 300), tmp_path)
    first = predict_files(bundle, arguments, left_eye="L", px_per_mm=5.0)
    second = predict_files(built(target, "fp32"), arguments, left_eye="L", px_per_mm=5.0)
    assert apart(first.outputs, second.outputs) < get_task("eyelid").budgets.float32
    assert first.units == second.units
    assert first.runtime != second.runtime


def test_the_bundle_names_its_size(bundle, built):
    assert input_size(open_bundle(bundle)) == (SIDE, SIDE)
    # Core ML's pictures have no batch side.
    assert input_size(open_bundle(built("coreml", "fp32"))) == (SIDE, SIDE)


# --- what comes back -----------------------------------------------------------------------------


def test_a_prediction_says_unit_runtime_and_notice(bundle, tmp_path):
    found = predict_files(bundle, stored(pictures(8, SIDE, SIDE), tmp_path))
    assert list(found.outputs) == ["mrd1_mm", "mrd2_mm", "lf_mm"]
    assert found.units == dict.fromkeys(found.outputs, "mm")
    assert found.runtime == f"onnxruntime {onnxruntime.__version__} (CPU)"
    assert found.notice == "Random weights."


# --- the picture ---------------------------------------------------------------------------------


def eye_with_reflex() -> np.ndarray:
    """A dark iris with a light reflex in the middle of the picture."""
    y, x = (np.mgrid[:400, :400] + 0.5 - 200) / 10
    image = np.full((400, 400, 3), 120, np.uint8)
    image[np.hypot(x, y / 0.6) < 12] = 225
    image[np.hypot(x, y) < 6] = 60
    image[np.hypot(x, y) < 0.8] = 255
    return image


def predicted_picture(bundle: Path, folder: Path) -> tuple[Prediction, Image.Image, dict]:
    images = dict.fromkeys(GAZES, eye_with_reflex())
    picture = folder / "measured.png"
    found = predict_files(bundle, stored(images, folder), picture=picture)
    fitted = {
        name: np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        for name, image in images.items()
    }
    with Image.open(picture) as drawn:
        return found, drawn.convert("RGB"), fitted


def test_the_picture_is_the_tasks_drawing_of_these_numbers(bundle, tmp_path):
    found, drawn, fitted = predicted_picture(bundle, tmp_path)
    caption = "eyelid-tiny-56-fp32 · Random weights."
    wanted = get_task("eyelid").draw(fitted, found.outputs, caption)
    assert np.array_equal(np.asarray(drawn), np.asarray(wanted))
    other = found.outputs | {"mrd1_mm": found.outputs["mrd1_mm"] + 0.2}
    assert not np.array_equal(drawn, get_task("eyelid").draw(fitted, other, caption))
    assert not np.array_equal(drawn, get_task("eyelid").draw(fitted, found.outputs, "other"))


def test_numbers_stand_where_they_were_measured(bundle, tmp_path):
    """The brackets start at the reflex, which is in the middle, and are as long as the numbers."""
    found, drawn, _ = predicted_picture(bundle, tmp_path)
    pixels = np.asarray(drawn).astype(int)
    per_mm = PANEL_PX / WINDOW_MM
    left, top = 82, 36
    middle_x, middle_y = left + PANEL_PX / 2, top + PANEL_PX / 2
    for target, side, down in (("mrd1", -1, -1), ("mrd2", 1, 1)):
        at = round(middle_x + side * 7.6 * per_mm)
        close = np.abs(pixels[:, at - 6 : at + 6] - _COLOURS[target]).sum(axis=2) < 60
        rows = np.nonzero(close.any(axis=1))[0] - middle_y
        end = down * found.outputs[f"{target}_mm"] * per_mm
        assert abs(end) > 5, "too short to tell"
        # The reflex is found to half a pixel of 56, four of the picture; lines are 3 wide.
        assert rows.min() == pytest.approx(min(0, end), abs=6)
        assert rows.max() == pytest.approx(max(0, end), abs=6)


# --- arguments -----------------------------------------------------------------------------------


def test_a_task_of_one_input_needs_no_name():
    assert _parse(["a.png"], ["image"]) == {"image": Path("a.png")}
    assert _parse(["image=a.png"], ["image"]) == {"image": Path("a.png")}


def test_a_file_may_have_an_equals_sign():
    assert _parse(["image=x=1.png"], ["image"]) == {"image": Path("x=1.png")}


def test_files_come_in_the_order_of_the_inputs():
    given = ["down=c", "primary=a", "up=b"]
    assert list(_parse(given, list(GAZES))) == list(GAZES)


def test_two_pictures_for_one_input_are_refused():
    with pytest.raises(UsageError, match=r"image is given twice: a\.png and b\.png"):
        _parse(["a.png", "b.png"], ["image"])
