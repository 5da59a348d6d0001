"""Made artifacts, kept between runs: each in a process of its own, and only if it is not there yet.

What is kept is marked with a digest of all that it depends on; a mark that differs means made anew.
"""

import hashlib
import multiprocessing
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from dinobench.peers.candidates import Candidate
from dinobench.peers.making import EXPECTED, NotMadeError, make_common, maker_of

TOOLS = (
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxslim",
    "litert-torch",
    "openvino",
    "nncf",
)
COMMON = "common"


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """How making went: with an artifact, or with the reason why there is none."""

    digest: str
    note: str = ""
    """What the table says beside the artifact."""
    reason: str = ""


class Folder(msgspec.Struct, frozen=True, kw_only=True):
    """Where the artifacts of one model at one size are."""

    path: Path
    size: int
    hot: bool

    def make_common(self) -> Made:
        """Make checkpoint, images and reference unless they are there."""
        return self._once(COMMON, EXPECTED, self._digest(ours=True), None)

    def make(self, candidate: Candidate) -> Made:
        """Make a candidate unless it is there."""
        ours = candidate.family == "ours" or candidate.runtime == "openvino"
        return self._once(candidate.name, candidate.file, self._digest(ours=ours), candidate)

    def _digest(self, *, ours: bool) -> str:
        """Digest of what an artifact depends on: ``ours`` adds this project's sources."""
        parts = [f"{name} {_version(name)}" for name in TOOLS]
        parts += [f"{self.size} {self.hot}"]
        parts += [f"{path.name} {_digest(path.read_bytes())}" for path in _sources(ours)]
        return _digest("\n".join(parts).encode())

    def _once(self, name: str, file: str, digest: str, candidate: Candidate | None) -> Made:
        artifact, mark = self.path / file, self.path / f"{name}.json"
        made = _read_mark(mark)
        if made and made.digest == digest and artifact.is_file():
            return made
        artifact.unlink(missing_ok=True)
        mark.unlink(missing_ok=True)
        note, reason = make_apart(self, name, candidate)
        if not reason and not artifact.is_file():
            reason = "its converter wrote nothing"
        made = Made(digest=digest, note=note, reason=reason)
        if not reason:
            mark.write_bytes(msgspec.json.encode(made))
        return made


def make_apart(folder: Folder, name: str, candidate: Candidate | None) -> tuple[str, str]:
    """Make something in a process of its own; return a note, and why it failed."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_make, args=(theirs, folder, name, candidate))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return "", "its converter's process ended"
    finally:
        process.join()


def _make(pipe: Connection, folder: Folder, name: str, candidate: Candidate | None) -> None:
    """Make something, its tools' talk in a log; send a note, and why it failed."""
    log = folder.path / f"{name}.log"
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    # Hubs are not asked, and NNCF tells nobody what it does.
    os.environ |= {"HF_HUB_OFFLINE": "1", "NNCF_CI": "1"}
    note, reason = "", ""
    try:
        if candidate is None:
            make_common(folder.path, folder.size, folder.hot)
        else:
            note = maker_of(candidate)(candidate, folder.path, folder.size, folder.hot)
    except NotMadeError as error:
        reason = str(error)
    except Exception as error:  # of several libraries
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    pipe.send((note, reason))


def _read_mark(path: Path) -> Made | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Made)
    except (OSError, msgspec.MsgspecError):
        return None


def _sources(ours: bool) -> Iterator[Path]:
    """Sources of how candidates are made; with ``ours`` those of the exporter and its models."""
    here = Path(__file__).parent
    yield from (here / name for name in ("making.py", "weights.py", "roofline.py"))
    if not ours:
        return
    import dinoexport
    import dinotrain

    for root in (*dinoexport.__path__, *dinotrain.__path__):
        yield from sorted(Path(root).rglob("*.py"))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
