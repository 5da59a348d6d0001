"""What only a process of its own shows: lean imports, signals, closed streams, a terminal."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "dinoexport"]
HEAVY = (
    "torch",
    "numpy",
    "onnx",
    "onnxruntime",
    "coremltools",
    "litert_torch",
    "ai_edge_litert",
    "huggingface_hub",
    "safetensors",
    "msgspec",
    "PIL",
    "scipy",
)


def imported(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter holds after ``code``."""
    script = f"import sys\n{code}\nprint(*sys.modules, sep='\\n', file=sys.stderr)"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(result.stderr.split())


@pytest.mark.parametrize("arguments", [["--help"], ["build", "--help"], ["train", "-h"], ["biuld"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    """A time would flake on a busy machine; what takes the time are these."""
    found = imported(
        "from dinoexport.cli import app\nfrom dinoexport.cli.output import run_app\n"
        f"run_app(app, {arguments})"
    )
    assert "dinoexport.cli.app" in found
    assert found.isdisjoint(HEAVY)


def test_that_check_sees_a_heavy_import() -> None:
    assert "numpy" in imported("import dinoexport.cli\nimport numpy")


def test_help_answers_soon() -> None:
    """The design allows half a second; ten times that only fails when something is wrong."""
    start = time.monotonic()
    subprocess.run([*COMMAND, "--help"], capture_output=True, check=True)
    assert time.monotonic() - start < 5


def test_a_closed_pipe_is_silent() -> None:
    for arguments in (["--version"], ["--help"], ["list", "--json"]):
        reader, writer = os.pipe()
        os.close(reader)
        result = subprocess.run(
            [*COMMAND, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )
        os.close(writer)
        assert result.stderr == ""
        # Not 1: no gate has failed.
        assert result.returncode in (0, 2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_below_stdout_is_told() -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [*COMMAND, "--version"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert result.returncode == 2
    assert result.stderr.startswith("OSError: No space left on device")
    assert result.stderr.count("\n") == 1


def test_closed_streams_do_no_harm(tmp_path: Path) -> None:
    for closed in ("1>&-", "2>&-", "1>&- 2>&-"):
        line = f"'{sys.executable}' -m dinoexport inspect '{tmp_path}' {closed}"
        result = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr


def test_a_console_that_is_not_unicode(build_all) -> None:
    result = subprocess.run(
        [*COMMAND, "inspect", str(build_all.bundle("onnx"))],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "cp866"},
    )
    # "56×56 pixels" stands in the manifest, and that code page has no ×.
    assert b"56\\xd756" in result.stdout


@pytest.mark.parametrize("target", ["onnx", "coreml", "tflite"])
def test_verify_alone_is_free_of_noise(build_all, target: str) -> None:
    """In this process the SDKs are imported already, and have said what they say once."""
    result = subprocess.run(
        [*COMMAND, "verify", str(build_all.bundle(target)), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert json.loads(result.stdout)["passed"] is True
    assert result.stderr.splitlines()[0].startswith("verify eyelid-tiny-56-fp16.")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE"])
def test_no_bar_into_a_file(build_all, variable: str) -> None:
    result = subprocess.run(
        [*COMMAND, "verify", str(build_all.bundle("onnx"))],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, variable: "1", "TERM": "xterm-256color"},
    )
    assert "\x1b" not in result.stdout + result.stderr


def test_a_terminal_without_colour(build_all) -> None:
    from dinoexport.cli.output import PASSED

    plain = on_terminal("verify", build_all.bundle("onnx"), NO_COLOR="1")
    assert plain.returncode == PASSED
    assert b"\x1b[3" not in plain.stderr
    coloured = on_terminal("verify", build_all.bundle("onnx"))
    assert b"\x1b[3" in coloured.stderr
    dumb = on_terminal("verify", build_all.bundle("onnx"), TERM="dumb")
    assert b"\x1b" not in dumb.stderr


def on_terminal(*arguments: object, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command with a terminal for stderr."""
    script = (
        "import os, pty, sys, subprocess\n"
        "primary, secondary = pty.openpty()\n"
        "child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=secondary)\n"
        "os.close(secondary)\n"
        "try:\n"
        "    while chunk := os.read(primary, 65536): os.write(2, chunk)\n"
        "except OSError: pass\n"
        "sys.exit(child.wait())\n"
    )
    environment = {**os.environ, "TERM": "xterm-256color", **variables}
    environment.pop("NO_COLOR", None) if "NO_COLOR" not in variables else None
    return subprocess.run(
        [sys.executable, "-c", script, *COMMAND, *map(str, arguments)],
        capture_output=True,
        check=False,
        env=environment,
    )


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "kill"])
def test_a_stopped_build_changes_nothing(tiny_checkpoint, copied, tmp_path, stop) -> None:
    earlier = copied.rename(tmp_path / "eyelid-tiny-56-fp16-onnx")
    before = files(earlier)
    arguments = ["build", "--task", "eyelid", "--target", "onnx", "--out", str(tmp_path), "--json"]
    process = subprocess.Popen(
        [*COMMAND, *arguments, "--checkpoint", str(tiny_checkpoint)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore ctrl-c, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr
    shown = []
    for line in process.stderr:
        shown.append(line)
        if line.startswith("capture"):
            break
    process.send_signal(stop)
    out, err = process.communicate(timeout=120)
    assert files(earlier) == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("eyelid")] == [earlier.name]
    if stop == signal.SIGINT:
        assert process.returncode == 130
        assert json.loads(out)["kind"] == "Interrupted"
        assert err.splitlines()[-1].startswith("Interrupted: ")
        assert "Traceback" not in err
        assert not list(tmp_path.glob(".dinoexport-partial-*"))
