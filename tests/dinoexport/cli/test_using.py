"""predict and inspect: what they print, and what they refuse."""

import json
import math

import numpy as np
import pytest
from PIL import Image

TARGETS = ("onnx", "coreml", "tflite")


@pytest.mark.parametrize("target", TARGETS)
def test_predict(run, build_all, gazes, target: str) -> None:
    result = run("predict", build_all.bundle(target), *gazes, "--json")
    assert result.status == 0
    assert result.err == ""
    assert list(result.json["outputs"]) == ["mrd1_mm", "mrd2_mm", "lf_mm"]
    assert set(result.json["units"].values()) == {"mm"}
    assert all(math.isfinite(value) for value in result.json["outputs"].values())
    assert result.json["notice"] == "Random weights."


def test_predict_in_words(run, build_all, gazes) -> None:
    text = run("predict", build_all.bundle("onnx"), *gazes).out
    for name, value in (
        run("predict", build_all.bundle("onnx"), *gazes, "--json").json["outputs"].items()
    ):
        assert any(line.split()[:2] == [name, f"{value:.3f}"] for line in text.splitlines())
    assert "Random weights." in text


def test_order_of_inputs_does_not_count(run, build_all, gazes) -> None:
    bundle = build_all.bundle("onnx")
    forward = run("predict", bundle, *gazes, "--json").json
    assert run("predict", bundle, *reversed(gazes), "--json").json == forward


def test_a_left_eye_is_mirrored(run, build_all, gazes, pictures, tmp_path) -> None:
    mirrored = []
    for name in ("primary", "up", "down"):
        with Image.open(pictures / f"{name}.png") as image:
            pixels = np.asarray(image)[:, ::-1]
        Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / f"{name}.png")
        mirrored.append(f"{name}={tmp_path / name}.png")
    bundle = build_all.bundle("onnx")
    right = run("predict", bundle, *gazes, "--json").json["outputs"]
    left = run("predict", bundle, *mirrored, "--eye", "L", "--json").json["outputs"]
    # Resizing is symmetric but for rounding to 8 bits.
    assert left == pytest.approx(right, abs=0.02)
    other = run("predict", bundle, *mirrored, "--json").json["outputs"]
    assert other != pytest.approx(right, abs=0.02)


def test_a_picture_is_drawn(run, build_all, gazes, tmp_path) -> None:
    picture = tmp_path / "deep" / "measured.png"
    result = run("predict", build_all.bundle("onnx"), *gazes, "--picture", picture, "--json")
    assert result.json["picture"] == str(picture)
    assert [p.name for p in picture.parent.iterdir()] == ["measured.png"]
    with Image.open(picture) as drawn:
        assert drawn.width > 300


def test_a_monochrome_picture_is_measured(run, build_all, gazes, pictures, tmp_path) -> None:
    with Image.open(pictures / "grey.png") as grey:
        grey.convert("RGB").save(tmp_path / "rgb.png")
    found = [
        run("predict", build_all.bundle("onnx"), f"primary={file}", *gazes[1:], "--json").json
        for file in (pictures / "grey.png", tmp_path / "rgb.png")
    ]
    assert found[0]["outputs"] == found[1]["outputs"]
    assert "greyscale" in run("inspect", build_all.bundle("onnx"), "--json").out


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("sixteen.png", "16 bits per channel"),
        ("small.png", "each side needs at least 32"),
        ("huge.png", "52 megapixels (7200×7200), at most 50"),
        ("text.png", "not a picture"),
        ("cut.png", "truncated or damaged"),
        ("empty.png", "the file is empty"),
        ("missing.png", "no such picture"),
        ("", "a folder, not a picture"),
    ],
)
def test_bad_pictures(refused, build_all, gazes, pictures, name: str, says: str) -> None:
    error = refused("predict", build_all.bundle("onnx"), f"primary={pictures / name}", *gazes[1:])
    assert error.startswith("DataError: ")
    assert says in error
    assert str(pictures / name) in error


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda g: g[:2], "input down is missing; give primary=FILE up=FILE down=FILE"),
        (lambda g: [], "input primary is missing"),
        (lambda g: [*g, g[0]], "input primary is given twice"),
        (lambda g: ["primry" + g[0].removeprefix("primary"), *g[1:]], "Did you mean 'primary'?"),
        (lambda g: ["primary=", *g[1:]], "names no file: 'primary='"),
        (lambda g: [g[0].partition("=")[2], *g[1:]], "does not say which input it is"),
        (lambda g: [*g, "--eye", "X"], "--eye 'X'"),
        (lambda g: [*g, "--px-per-mm", "0"], "--px-per-mm 0"),
        (lambda g: [*g, "--px-per-mm", "nan"], "--px-per-mm nan"),
        (lambda g: [*g, "--px-per-mm", "100"], "less than half of the 40 mm window"),
    ],
    ids=["missing", "none", "twice", "misspelt", "empty", "bare", "eye", "zero", "nan", "scale"],
)
def test_bad_inputs(refused, build_all, gazes, change, says: str) -> None:
    assert says in refused("predict", build_all.bundle("onnx"), *change(gazes))


@pytest.mark.parametrize(
    ("picture", "says"),
    [("a.jpg", "Use "), ("folder.png", "a folder is in the way"), ("file/a.png", "cannot be")],
)
def test_a_picture_that_cannot_be_drawn(refused, build_all, gazes, tmp_path, picture, says) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())
    error = refused("predict", build_all.bundle("onnx"), *gazes, "--picture", tmp_path / picture)
    assert says in error
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("target", TARGETS)
def test_inspect_a_bundle(run, build_all, target: str) -> None:
    bundle = build_all.bundle(target)
    result = run("inspect", bundle, "--json")
    assert result.err == ""
    manifest = json.loads((bundle / "manifest.json").read_text())
    for key, value in manifest.items():
        assert result.json[key] == value
    assert result.json["embedded_metadata"]["checkpoint_sha256"] == manifest["checkpoint"]["sha256"]
    assert sum(result.json["operations"].values()) > 20


def test_inspect_a_checkpoint(run, tiny_checkpoint) -> None:
    facts = run("inspect", tiny_checkpoint, "--json").json
    assert facts["checkpoint"] == str(tiny_checkpoint)
    assert facts["backbone"]["registers"] == 2
    text = run("inspect", tiny_checkpoint).out
    assert "  registers: 2" in text
    assert "notice: Random weights." in text


def test_inspect_passes(run, tiny_checkpoint) -> None:
    """One of the commands writes JSON, the other lines: both cost a dozen captures."""
    found = run("inspect", tiny_checkpoint, "--passes", "--json").json
    steps = {step["name"]: step for step in found["passes"]}
    assert next(iter(steps)) == "cut_unread"
    assert list(steps)[-1] == "fold_head"
    # Two blocks, three layers for each one; two chunks are gone.
    assert steps["split_qkv"]["changed"] == {"linear": [12, 16], "split": [2, 0]}
    assert steps["fold_layer_scale"]["changed"] == {"mul": [15, 11]}
    assert steps["write_out_attention"]["changed"]["scaled_dot_product_attention"] == [2, 0]
    assert steps["cut_last_block"]["changed"] == {}
    before, after = zip(*(step["operations"] for step in found["passes"]), strict=True)
    assert before[1:] == after[:-1]
    assert after[-1] == sum(found["operations"].values())
    for step in steps.values():
        change = step["operations"][1] - step["operations"][0]
        assert change == sum(new - old for old, new in step["changed"].values())


def test_inspect_passes_in_lines(run, tiny_checkpoint, monkeypatch) -> None:
    from dinoexport.passes import sequence

    monkeypatch.setattr(sequence, "PASSES", sequence.PASSES[1:3])
    lines = run("inspect", tiny_checkpoint, "--passes").out.splitlines()
    assert [line.split()[0] for line in lines] == ["fold_batch_norms", "fold_normalisation", "left"]
    assert lines[0].endswith("same")
    assert lines[1].endswith("div 2 → 0, sub 2 → 1")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--layout", "rows"], "unknown layout 'rows'. Known: ane, cpu, tokens."),
        (["folder"], "--passes reads a checkpoint (.safetensors)"),
    ],
)
def test_inspect_passes_of_something_else(
    refused, tiny_checkpoint, tmp_path, options, says
) -> None:
    path = tmp_path if options == ["folder"] else tiny_checkpoint
    more = [] if options == ["folder"] else options
    assert says in refused("inspect", path, "--passes", *more)


def test_inspect_obeys_no_escapes_from_a_file(run, tiny_checkpoint, tmp_path) -> None:
    import msgspec

    from dinotrain.checkpoint import load_checkpoint, save_checkpoint

    model, config = load_checkpoint(tiny_checkpoint)
    config = msgspec.structs.replace(config, notice="\x1b[2J\nbackbone: forged")
    result = run("inspect", save_checkpoint(model, config, tmp_path / "odd.safetensors"))
    assert "notice: ?[2J backbone: forged" in result.out
    assert "\x1b" not in result.out


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing", "no such file or folder"),
        ("file.bin", "neither a bundle"),
        ("text.safetensors", "not a .safetensors checkpoint"),
        ("folder", "not a bundle"),
    ],
)
def test_inspect_something_else(refused, tmp_path, name: str, says: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.bin").touch()
    (tmp_path / "text.safetensors").write_text("text, and a little more of it")
    assert says in refused("inspect", tmp_path / name)
