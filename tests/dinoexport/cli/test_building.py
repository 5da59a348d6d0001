"""build, verify, reference: results, exit status, and every refusal."""

import hashlib
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

TARGETS = ("onnx", "coreml", "tflite")
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
STEP = re.compile(
    r"\S? ?(load tiny\.safetensors|reference \(PyTorch float32\)|prepare for fp16|capture"
    r"|lower to (onnx|coreml|tflite)|verify (onnx|coreml|tflite))( .*)?"
)


class Planted:
    """What a pickle with code in it does when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.fixture
def refuse_build(refused, tmp_path):
    """A build that must be refused and must leave nothing."""

    def call(checkpoint: Path, *arguments: object) -> str:
        out = tmp_path / "never"
        error = refused(
            "build", "--task", "eyelid", "--target", "onnx", "--checkpoint", checkpoint,
            "--out", out, *arguments,
        )  # fmt: skip
        left = (
            [p.name for p in out.rglob("*") if p.name != ".dinoexport.lock"] if out.exists() else []
        )
        assert left == []
        return error

    return call


def test_build_prints_one_json_object(build_all) -> None:
    facts = build_all.result.json
    assert build_all.result.status == 0
    assert facts["passed"] is True
    assert [bundle["target"] for bundle in facts["bundles"]] == list(TARGETS)
    for bundle in facts["bundles"]:
        assert bundle.keys() == {"target", "precision", "path", "passed", "size_bytes", "parity"}
        assert bundle["precision"] == "fp16"
        assert Path(bundle["path"]) == build_all.bundle(bundle["target"])
        artifact = json.loads((Path(bundle["path"]) / "manifest.json").read_text())["artifact"]
        file = Path(bundle["path"]) / artifact
        files = [file] if file.is_file() else [p for p in file.rglob("*") if p.is_file()]
        assert bundle["size_bytes"] == sum(p.stat().st_size for p in files)
        assert bundle["parity"]["passed"] is True
        assert bundle["parity"]["outputs"].keys() == {"mrd1_mm", "mrd2_mm", "lf_mm"}


def test_the_terminal_shows_steps_and_no_noise(build_all) -> None:
    """Converters print a lot; it must be in the log, and all of the terminal be ours."""
    assert (build_all.out / "build.log").stat().st_size > 0
    shown = [
        piece.strip()
        for piece in re.split(r"[\r\n]", ANSI.sub("", build_all.result.err))
        if piece.strip()
    ]
    foreign = [p for p in shown if p != "Random weights." and not STEP.fullmatch(p)]
    assert foreign == []
    for target in TARGETS:
        assert any(re.fullmatch(rf"lower to {target}  \d+\.\d s", piece) for piece in shown)
    # The bar was drawn, not only the lines at the end.
    assert "━" in build_all.result.err


def test_that_check_sees_noise() -> None:
    for noise in ("UserWarning: x", "W0000 00:00:1 foo.cc:3] x", "100%|████| 3/3", "lower tflite"):
        assert not STEP.fullmatch(noise)


def test_dry_run_writes_nothing(run, tiny_checkpoint, tmp_path) -> None:
    arguments = ["build", "--task", "eyelid", "--target", "all", "--checkpoint", tiny_checkpoint]
    arguments += ["--out", tmp_path / "out", "--dry-run"]
    facts = run(*arguments, "--json").json
    assert facts["dry_run"] is True
    assert facts["image_size"] == [56, 56]
    names = [Path(path).name for path in facts["bundles"]]
    assert names == [f"eyelid-tiny-56-fp16-{target}" for target in TARGETS]
    text = run(*arguments).out
    assert "nothing was written" in text
    assert all(path in text for path in facts["bundles"])
    assert list(tmp_path.iterdir()) == []


def test_a_raised_system_is_told(run, tiny_checkpoint, tmp_path) -> None:
    arguments = ["build", "--task", "eyelid", "--target", "coreml", "--checkpoint", tiny_checkpoint]
    arguments += ["--out", tmp_path / "out", "--dry-run", "--precision"]
    told = "coreml: pal4 needs iOS 18; iOS 17 cannot open the package"
    assert run(*arguments, "pal4", "--json").json["notices"] == [told]
    assert told in run(*arguments, "pal4").out
    assert run(*arguments, "pal4", "--minimum-ios", "18", "--json").json["notices"] == []
    assert run(*arguments, "w8", "--json").json["notices"] == []


@pytest.mark.parametrize(
    ("option", "typed", "says"),
    [
        ("--task", "eyelids", "unknown task 'eyelids'. Did you mean 'eyelid'?"),
        ("--target", "onx", "unknown target 'onx'. Did you mean 'onnx'?"),
        ("--target", "core-ml", "unknown target 'core-ml'. Did you mean 'coreml'?"),
        ("--precision", "fp61", "unknown precision 'fp61'. Did you mean 'fp16'?"),
        ("--precision", "int8", "unknown precision 'int8'. Known: fp16, fp32, pal4"),
        ("--minimum-ios", "12", "Invalid value '12' for '--minimum-ios'"),
        ("--image-size", "60", "image size 56, and --image-size 60 is not a multiple of the patch "
         "size 14. Use 56 or 70."),
        ("--image-size", "56x57", "--image-size 57 is not a multiple"),
        ("--image-size", "5", "Use 14 or 28."),
        ("--image-size", "2800", "over 1036"),
        ("--image-size", "big", "--image-size 'big' is no size"),
    ],
)  # fmt: skip
def test_unknown_names_and_sizes(refuse_build, tiny_checkpoint, option, typed, says) -> None:
    assert says in refuse_build(tiny_checkpoint, option, typed)


def test_image_size_message_is_the_designs(refuse_build, tiny_checkpoint) -> None:
    assert refuse_build(tiny_checkpoint, "--image-size", "230") == (
        "CheckpointError: tiny.safetensors was trained for image size 56, and --image-size 230 is "
        "not a multiple of the patch size 14. Use 224 or 238."
    )


def test_foreign_checkpoints(refuse_build, tiny_checkpoint, tmp_path) -> None:
    raw = tiny_checkpoint.read_bytes()
    files = {
        "cut.safetensors": raw[: len(raw) // 2],
        "empty.safetensors": b"",
        "text.safetensors": b"some text that is longer than a header",
        "nan.safetensors": raw[:-64] + b"\xff" * 64,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        error = refuse_build(tmp_path / name)
        assert error.startswith("CheckpointError: ")
        assert name in error
    save_file({"a": torch.zeros(3)}, tmp_path / "bare.safetensors")
    assert "no trained checkpoint" in refuse_build(tmp_path / "bare.safetensors")
    assert "no such checkpoint" in refuse_build(tmp_path / "missing.safetensors")
    assert "CheckpointError" in refuse_build(tmp_path)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_pickle_is_never_opened(refuse_build, tmp_path, suffix: str, form: str) -> None:
    mark, file = tmp_path / "ran", tmp_path / f"evil.{suffix}"
    if form == "pickle":
        file.write_bytes(pickle.dumps({"a": Planted(mark)}))
    else:
        torch.save({"a": Planted(mark)}, file)
    assert refuse_build(file).startswith("CheckpointError: ")
    assert not mark.exists()
    # The code is live: whoever unpickles the file runs it.
    if form == "pickle":
        pickle.loads(file.read_bytes())
    else:
        # By its suffix torch would take a .safetensors for what it says.
        torch.load(file.rename(file.with_suffix(".pt")), weights_only=False)
    assert mark.exists()


def test_out_is_a_file(refused, tiny_checkpoint, tmp_path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below"):
        error = refused(
            "build", "--task", "eyelid", "--target", "onnx", "--checkpoint", tiny_checkpoint,
            "--out", out,
        )  # fmt: skip
        assert f"{file} is a file" in error
    assert file.read_text() == "mine"


def test_a_failed_gate_is_status_1(run, tiny_checkpoint, tmp_path, monkeypatch) -> None:
    # No build can reach this: the gate is planted to fail, and the rest is a real build.
    monkeypatch.setattr("dinoexport.verify.parity.STRUCTURE_DB", 500.0)
    result = run(
        "build", "--task", "eyelid", "--target", "onnx", "--checkpoint", tiny_checkpoint,
        "--out", tmp_path, "--json",
    )  # fmt: skip
    assert result.status == 1
    assert result.json["passed"] is False
    assert result.json["bundles"][0]["parity"]["blame"]["message"]
    # The verdict is repeated by verify, in words.
    text = run("verify", result.json["bundles"][0]["path"])
    assert text.status == 1
    assert text.out.startswith("FAIL  ")
    assert "blame" in text.out


@pytest.mark.parametrize("target", TARGETS)
def test_verify(run, build_all, target: str) -> None:
    result = run("verify", build_all.bundle(target), "--json")
    facts = result.json
    assert result.status == 0
    assert facts["passed"] is True
    assert facts["blame"] is None
    assert facts["runtime"]
    assert facts["reference"]["device"]
    for output in facts["outputs"].values():
        assert output.keys() >= {"unit", "max_error", "budget", "sqnr_db"}
        assert output["unit"] == "mm"
        assert output["max_error"] <= output["budget"]


def test_verify_in_words(run, build_all) -> None:
    result = run("verify", build_all.bundle("onnx"))
    assert result.out.startswith("PASS  ")
    assert "mm of 0.02 allowed" in result.out


def test_verify_against_another_reference(run, refused, build_all, tiny_checkpoint, tmp_path):
    file = tmp_path / "deep" / "reference.safetensors"
    made = run("reference", "--checkpoint", tiny_checkpoint, "--out", file, "--json")
    assert made.json["path"] == str(file)
    assert made.json["samples"] > 0
    bundle = build_all.bundle("onnx")
    assert run("verify", bundle, "--reference", file, "--json").json["passed"] is True
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    missing = tmp_path / "missing.safetensors"
    assert "no such reference" in refused("verify", bundle, "--reference", missing)
    assert "not a reference" in refused("verify", bundle, "--reference", tiny_checkpoint)
    larger = tmp_path / "larger.safetensors"
    run("reference", "--checkpoint", tiny_checkpoint, "--image-size", "70", "--out", larger)
    assert "--image-size" in refused("verify", bundle, "--reference", larger)


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(bytes(raw))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda file: flip(file), "does not match its sha256"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "bytes, the manifest says"),
        (lambda file: file.unlink(), "is missing"),
    ],
    ids=["flipped", "cut", "missing"],
)
@pytest.mark.parametrize("name", ["eyelid-tiny-56-fp16.onnx", "reference.safetensors"])
def test_a_changed_file_fails_the_gate(run, refused, copied, gazes, change, says, name) -> None:
    change(copied / name)
    result = run("verify", copied, "--json")
    assert result.status == 1
    assert result.json["passed"] is False
    assert says in result.json["error"]
    assert name in result.json["error"]
    words = run("verify", copied)
    assert words.status == 1
    assert words.out.startswith("FAIL  ")
    # To use it is refused, which is no verdict.
    assert says in refused("predict", copied, *gazes)
    assert says in refused("inspect", copied)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda m: m | {"colour": "red"}, "unknown field `colour`"),
        (lambda m: m | {"schema_version": 7}, "manifest schema 7, this version reads 1"),
        (lambda m: m | {"artifact": "../../x"}, "leaves the bundle"),
        (lambda m: {k: v for k, v in m.items() if k != "parity"}, "parity"),
        (lambda m: [m], "manifest.json"),
    ],
    ids=["unknown-key", "version", "escape", "missing-key", "list"],
)
@pytest.mark.parametrize("command", ["verify", "predict", "inspect"])
def test_a_foreign_manifest(refused, copied, gazes, edit, says, command) -> None:
    file = copied / "manifest.json"
    file.write_text(json.dumps(edit(json.loads(file.read_text()))))
    images = gazes if command == "predict" else []
    error = refused(command, copied, *images)
    assert error.startswith("BundleError: ")
    assert says in error


@pytest.mark.parametrize("command", ["verify", "predict"])
def test_no_bundle_at_all(refused, tmp_path, gazes, command) -> None:
    images = gazes if command == "predict" else []
    assert "not a bundle" in refused(command, tmp_path, *images)
    assert "not a bundle" in refused(command, tmp_path / "missing", *images)


@pytest.mark.parametrize(
    ("out", "says"),
    [("r.bin", "Use "), ("folder.safetensors", "is a folder"), ("file/r.safetensors", "is a file")],
)
def test_a_reference_that_cannot_be_written(refused, tiny_checkpoint, tmp_path, out, says) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())
    assert says in refused("reference", "--checkpoint", tiny_checkpoint, "--out", tmp_path / out)
    assert sorted(tmp_path.iterdir()) == before


def test_a_build_over_its_own_bundle(run, build_all, tiny_checkpoint, tmp_path, copied) -> None:
    """A refused build leaves the bundle that stood there, byte for byte."""
    digest = hashlib.sha256((copied / "manifest.json").read_bytes()).hexdigest()
    run(
        "build", "--task", "eyelid", "--target", "onnx", "--checkpoint", tiny_checkpoint,
        "--out", tmp_path, "--image-size", "60",
    )  # fmt: skip
    assert hashlib.sha256((copied / "manifest.json").read_bytes()).hexdigest() == digest
