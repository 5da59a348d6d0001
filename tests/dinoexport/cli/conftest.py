"""The command line in this process, pictures good and bad, and bundles built by the command."""

import errno
import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinoexport.cli import app
from dinoexport.cli.output import run_app

COMMAND = [sys.executable, "-m", "dinoexport"]


@dataclass(frozen=True)
class Result:
    """What a command gave."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object that stdout holds."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The last line of stderr, which names what failed."""
        return self.err.splitlines()[-1]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run a command line in this process."""

    def call(*arguments: object) -> Result:
        capfd.readouterr()
        status = run_app(app, [str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Result(status, captured.out, captured.err)

    return call


@pytest.fixture
def refused(run: Callable[..., Result]) -> Callable[..., str]:
    """Run a command line that must be refused; give its error, which is one line in both forms."""

    def call(*arguments: object) -> str:
        plain = run(*arguments)
        assert plain.status == 2
        assert plain.out == ""
        assert "Traceback" not in plain.err
        kind, _, message = plain.error.partition(": ")
        assert kind.endswith("Error"), plain.err
        machine = run(*arguments, "--json")
        assert machine.status == 2
        assert machine.json == {"error": message, "kind": kind}
        return plain.error

    return call


def terminal(*arguments: object, environment: dict[str, str] | None = None) -> Result:
    """Run the command in a process whose stderr is a terminal and whose stdout is a pipe."""
    primary, secondary = pty.openpty()
    variables = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **(environment or {})}
    with subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=secondary, env=variables
    ) as process:
        os.close(secondary)
        shown = b""
        while chunk := _read(primary):
            shown += chunk
        assert process.stdout
        out = process.stdout.read().decode()
    os.close(primary)
    return Result(process.returncode, out, shown.decode())


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError as error:
        # Linux says so at the end of a terminal.
        if error.errno == errno.EIO:
            return b""
        raise


@dataclass(frozen=True)
class Built:
    """One ``build --target all`` on a terminal."""

    result: Result
    out: Path

    def bundle(self, target: str) -> Path:
        return self.out / f"eyelid-tiny-56-fp16-{target}"


@pytest.fixture(scope="session")
def build_all(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Do not change its bundles; ``copied`` gives one that may be changed."""
    out = tmp_path_factory.mktemp("built")
    arguments = ("--task", "eyelid", "--target", "all", "--checkpoint", tiny_checkpoint)
    return Built(terminal("build", *arguments, "--out", out, "--json"), out)


@pytest.fixture
def copied(build_all: Built, tmp_path: Path) -> Path:
    """An ONNX bundle that a test may change."""
    return Path(shutil.copytree(build_all.bundle("onnx"), tmp_path / "bundle"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good pictures (primary, up, down .png) and of bad ones."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (3, 80, 90, 3), dtype=np.uint8)
    for name, image in zip(("primary", "up", "down"), pixels, strict=True):
        Image.fromarray(image).save(folder / f"{name}.png")
    grey = pixels[0, :, :, 0]
    Image.fromarray(grey).save(folder / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 256).save(folder / "sixteen.png")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "small.png")
    Image.fromarray(np.zeros((7200, 7200, 3), np.uint8)).save(folder / "huge.png")
    (folder / "text.png").write_text("no picture")
    (folder / "cut.png").write_bytes((folder / "primary.png").read_bytes()[:3000])
    (folder / "empty.png").touch()
    return folder


@pytest.fixture(scope="session")
def gazes(pictures: Path) -> list[str]:
    return [f"{name}={pictures / name}.png" for name in ("primary", "up", "down")]
