"""Bundles are put in place whole or not at all, and a changed one is told from what was built."""

import errno
import hashlib
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from dinoexport import bundle as bundle_module
from dinoexport.bundle import (
    EARLIER,
    LOCK,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    PARTIAL,
    REFERENCE,
    REPORT,
    artifact_digest,
    check_files,
    check_measured,
    lock_output,
    open_bundle,
    record_files,
    staged,
    write_manifest,
)
from dinoexport.errors import BuildError, BundleError, TamperedError
from dinoexport.manifest import Manifest

NAME = "eyelid-tiny-coreml"
PARTS = tuple(f"part{index}" for index in range(8))
fork = multiprocessing.get_context("fork")
"""Children share what is imported, so that they start in milliseconds."""


def content(generation: int) -> bytes:
    return f"{generation}\n".encode() * 500


def write_parts(folder: Path, generation: int) -> None:
    for part in (MANIFEST, *PARTS):
        (folder / part).write_bytes(content(generation))


def put(out: Path, generation: int) -> None:
    with lock_output(out), staged(out, NAME) as folder:
        write_parts(folder, generation)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def whole(generation: int) -> dict[str, bytes]:
    return dict.fromkeys((MANIFEST, *PARTS), content(generation))


def left(out: Path) -> list[str]:
    """What lies in an output folder besides the bundle and the lock."""
    return sorted(p.name for p in out.iterdir() if p.name not in (NAME, LOCK))


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# --- in place in one step ------------------------------------------------------------------------


class Reader(threading.Thread):
    """Reads the bundle of a name over and over, and notes everything that is not whole."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.seen: set[bytes] = set()
        self.faults: list[str] = []
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.is_set():
            try:
                folder = os.open(self.path, os.O_RDONLY)
            except FileNotFoundError:
                self.faults.append("no bundle")
                continue
            try:
                self._read(folder)
            finally:
                os.close(folder)

    def _read(self, folder: int) -> None:
        found = set()
        try:
            for part in (MANIFEST, *PARTS):
                with os.fdopen(os.open(part, os.O_RDONLY, dir_fd=folder), "rb") as file:
                    found.add(file.read())
        except FileNotFoundError:
            # A folder that lost its name since it was opened may be cleared away.
            if self._has_the_name(folder):
                self.faults.append("a part is missing")
            return
        if len(found) > 1:
            self.faults.append("parts of two bundles")
        self.seen |= found

    def _has_the_name(self, folder: int) -> bool:
        return self.path.exists() and self.path.stat().st_ino == os.fstat(folder).st_ino


def replace_often(out: Path, count: int) -> Reader:
    put(out, 0)
    reader = Reader(out / NAME)
    reader.start()
    for generation in range(1, count):
        put(out, generation)
    reader.stopped.set()
    reader.join()
    return reader


def test_a_reader_always_sees_a_whole_bundle(tmp_path: Path) -> None:
    reader = replace_often(tmp_path, 200)
    assert reader.faults == []
    # It did read between the replacements.
    assert len(reader.seen) > 3
    assert files(tmp_path / NAME) == whole(199)
    assert left(tmp_path) == []


def test_that_reader_sees_a_bundle_that_is_not_whole(tmp_path: Path, monkeypatch) -> None:
    def file_by_file(source: Path, destination: Path) -> None:
        destination.mkdir(exist_ok=True)
        for part in sorted(source.iterdir()):
            shutil.copy(part, destination)

    monkeypatch.setattr(bundle_module, "_put_in_place", file_by_file)
    assert "parts of two bundles" in replace_often(tmp_path, 200).faults


def test_that_reader_sees_a_moment_without_a_bundle(tmp_path: Path, monkeypatch) -> None:
    def away_and_back(source: Path, destination: Path) -> None:
        shutil.rmtree(destination, ignore_errors=True)
        source.rename(destination)

    monkeypatch.setattr(bundle_module, "_put_in_place", away_and_back)
    assert replace_often(tmp_path, 200).faults != []


def test_the_new_folder_starts_empty_and_hidden(tmp_path: Path) -> None:
    with lock_output(tmp_path), staged(tmp_path, NAME) as folder:
        assert folder.name.startswith(".")
        assert list(folder.iterdir()) == []
        assert not (tmp_path / NAME).exists()
        write_parts(folder, 1)
    assert files(tmp_path / NAME) == whole(1)


def test_an_error_inside_leaves_the_earlier_bundle(tmp_path: Path) -> None:
    put(tmp_path, 1)
    for error in (BundleError("x"), KeyboardInterrupt(), ValueError("x")):
        with pytest.raises(type(error)), lock_output(tmp_path), staged(tmp_path, NAME) as folder:
            write_parts(folder, 2)
            raise error
        assert files(tmp_path / NAME) == whole(1)
        assert left(tmp_path) == []


def test_an_empty_folder_gives_way(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    put(tmp_path, 1)
    assert files(tmp_path / NAME) == whole(1)


def in_the_way(tmp_path: Path) -> dict[str, Callable[[Path], object]]:
    def foreign(path: Path) -> None:
        path.mkdir()
        (path / "thesis.txt").write_text("mine")

    def link(path: Path) -> None:
        put(tmp_path / "elsewhere", 1)
        path.symlink_to(tmp_path / "elsewhere" / NAME)

    return {
        "file": lambda path: path.write_text("mine"),
        "folder": foreign,
        "link": link,
        "broken-link": lambda path: path.symlink_to("nowhere"),
    }


@pytest.mark.parametrize("kind", ["file", "folder", "link", "broken-link"])
def test_what_is_in_the_way_stays(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    in_the_way(tmp_path)[kind](out / NAME)
    before = files(tmp_path), (out / NAME).is_symlink()
    with pytest.raises(BuildError) as error:
        put(out, 2)
    assert str(out / NAME) in one_line(error)
    if kind in ("file", "folder"):
        assert "in the way" in str(error.value)
    (out / LOCK).unlink()
    assert (files(tmp_path), (out / NAME).is_symlink()) == before
    assert left(out) == []


# --- killed --------------------------------------------------------------------------------------


def kill_while(out: Path, work: Callable[..., None]) -> None:
    """Run ``work(out, said)`` in a process until it says that it is there, then SIGKILL."""
    said = fork.Event()
    process = fork.Process(target=work, args=(out, said))
    process.start()
    assert said.wait(20)
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def half_a_bundle(out: Path, said) -> None:
    with lock_output(out), staged(out, NAME) as folder:
        (folder / "part0").write_bytes(content(2))
        said.set()
        signal.pause()


def test_a_killed_build_leaves_the_earlier_bundle(tmp_path: Path) -> None:
    put(tmp_path, 1)
    kill_while(tmp_path, half_a_bundle)
    assert files(tmp_path / NAME) == whole(1)
    # It really was killed in the middle.
    assert left(tmp_path) == [f"{PARTIAL}{NAME}"]
    with lock_output(tmp_path):
        assert left(tmp_path) == []
        assert files(tmp_path / NAME) == whole(1)
    put(tmp_path, 3)
    assert files(tmp_path / NAME) == whole(3)


def between_two_renames(out: Path, said) -> None:
    bundle_module._exchange = lambda *_: False
    rename = Path.rename

    def stop_before_the_second(self: Path, target: Path) -> Path:
        if self.name.startswith(PARTIAL):
            said.set()
            signal.pause()
        return rename(self, target)

    Path.rename = stop_before_the_second  # type: ignore[method-assign]
    put(out, 2)


def test_a_build_killed_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    """Without an exchange the earlier bundle has another name for a moment."""
    put(tmp_path, 1)
    kill_while(tmp_path, between_two_renames)
    assert not (tmp_path / NAME).exists()
    assert left(tmp_path) == [f"{EARLIER}{NAME}", f"{PARTIAL}{NAME}"]
    with lock_output(tmp_path):
        assert files(tmp_path / NAME) == whole(1)
        assert left(tmp_path) == []


def test_an_earlier_bundle_never_comes_back_over_a_new_one(tmp_path: Path) -> None:
    put(tmp_path, 2)
    shutil.copytree(tmp_path / NAME, tmp_path / f"{EARLIER}{NAME}")
    (tmp_path / f"{EARLIER}{NAME}" / "part0").write_bytes(content(1))
    with lock_output(tmp_path):
        assert files(tmp_path / NAME) == whole(2)
        assert left(tmp_path) == []


# --- without an exchange of two folders ----------------------------------------------------------


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "_exchange", lambda *_: False)


def test_this_system_exchanges(tmp_path: Path) -> None:
    """Or the tests above saw the other path only."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    exchanged = bundle_module._exchange(tmp_path / "a", tmp_path / "b")
    if not exchanged:
        pytest.skip("this file system cannot exchange two folders")
    assert (tmp_path / "a" / "b").exists()
    assert (tmp_path / "b" / "a").exists()
    assert not bundle_module._exchange(tmp_path / "a", tmp_path / "missing")


@pytest.mark.usefixtures("no_exchange")
def test_replaced_without_an_exchange(tmp_path: Path) -> None:
    for generation in range(3):
        put(tmp_path, generation)
        assert files(tmp_path / NAME) == whole(generation)
        assert left(tmp_path) == []


@pytest.mark.usefixtures("no_exchange")
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_the_earlier_bundle_comes_back_when_the_new_one_fails(
    tmp_path: Path, monkeypatch, error: BaseException
) -> None:
    put(tmp_path, 1)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.startswith(PARTIAL):
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises((BuildError, KeyboardInterrupt)):
        put(tmp_path, 2)
    assert files(tmp_path / NAME) == whole(1)
    assert left(tmp_path) == []


# --- a full disk ---------------------------------------------------------------------------------


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """A limit of the system on the size of files: its error comes from a real write."""
    put(tmp_path, 1)
    said = fork.SimpleQueue()

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            put(tmp_path, 2)
            said.put("it could be written")
        except BuildError as error:
            said.put(str(error))

    process = fork.Process(target=limited)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert said.get() == (
        f"{tmp_path / NAME}: cannot be written: File too large. Free some space or give another "
        "--out; an earlier bundle there is unchanged."
    )
    assert files(tmp_path / NAME) == whole(1)
    assert left(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(tmp_path: Path) -> None:
    put(tmp_path, 1)
    with (
        pytest.raises(BuildError) as error,
        lock_output(tmp_path),
        staged(tmp_path, NAME) as folder,
    ):
        write_parts(folder, 2)
        (folder / "more").symlink_to("/dev/full")
        (folder / "more").write_bytes(b"x")
    assert "cannot be written: No space left on device. Free some space" in one_line(error)
    assert files(tmp_path / NAME) == whole(1)
    assert left(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_a_disk_that_is_full_later(tmp_path: Path, monkeypatch, call: str) -> None:
    """Files may be accepted and fail when they are brought to the disk, or get their name."""
    put(tmp_path, 1)

    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with lock_output(tmp_path), monkeypatch.context() as patch:
        patch.setattr(bundle_module, "_exchange", lambda *_: False)
        patch.setattr(*{
            "fsync": (os, "fsync"), "rename": (Path, "rename"), "mkdir": (Path, "mkdir"),
        }[call], full)  # fmt: skip
        with pytest.raises(BuildError) as error, staged(tmp_path, NAME) as folder:
            write_parts(folder, 2)
    assert "No space left on device" in one_line(error)
    assert files(tmp_path / NAME) == whole(1)
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("raised", "says"),
    [
        (OSError(), "cannot be written: OSError."),
        (OSError("two\nlines"), "cannot be written: two lines."),
        (OSError(errno.ENOSPC, "No space", "/some/file"), "cannot be written: No space."),
        (PermissionError(errno.EACCES, "Permission denied"), "written: Permission denied."),
    ],
    ids=["bare", "two-lines", "with-a-path", "permission"],
)
def test_any_error_of_the_system_is_one_line(tmp_path: Path, raised: OSError, says: str) -> None:
    with pytest.raises(BuildError) as error, staged(tmp_path, NAME):
        raise raised
    assert says in one_line(error)


# --- two builds at once --------------------------------------------------------------------------


def test_two_builds_into_one_folder(tmp_path: Path) -> None:
    put(tmp_path, 1)
    inside, go = fork.Event(), fork.Event()

    def first() -> None:
        with lock_output(tmp_path), staged(tmp_path, NAME) as folder:
            write_parts(folder, 2)
            inside.set()
            go.wait(20)

    process = fork.Process(target=first)
    process.start()
    assert inside.wait(20)
    with pytest.raises(BuildError) as error:
        put(tmp_path, 3)
    assert one_line(error) == (
        f"{tmp_path}: another build is writing into this folder. "
        "Wait for it, or give another --out."
    )
    # What the first one has half done was not taken for what a killed build left.
    assert left(tmp_path) == [f"{PARTIAL}{NAME}"]
    go.set()
    process.join()
    assert process.exitcode == 0
    assert files(tmp_path / NAME) == whole(2)
    put(tmp_path, 3)
    assert files(tmp_path / NAME) == whole(3)


def test_two_builds_into_two_folders(tmp_path: Path) -> None:
    with lock_output(tmp_path / "a"), lock_output(tmp_path / "b"):
        pass


def test_an_output_folder_that_cannot_be_one(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    blocked = tmp_path / "blocked"
    (blocked / LOCK).mkdir(parents=True)
    for out in (file, file / "below", blocked, tmp_path / ("x" * 300)):
        with pytest.raises(BuildError) as error, lock_output(out):
            pass
        assert one_line(error).startswith(f"{out}: cannot build there: ")
    assert file.read_text() == "mine"


# --- a bundle that was changed -------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, manifest: Manifest) -> Path:
    """A bundle whose artifact is a folder, as Core ML's is."""
    folder = tmp_path / "bundle"
    inner = folder / manifest.artifact / "Data"
    inner.mkdir(parents=True)
    (inner / "weights").write_bytes(bytes(range(256)) * 1000)
    (inner.parent / "model").write_bytes(b"model")
    (folder / REFERENCE).write_bytes(b"reference")
    (folder / REPORT).write_text("# report")
    write_manifest(folder, msgspec.structs.replace(manifest, files=record_files(folder)))
    return folder


WEIGHTS = "eyelid-tiny.mlpackage/Data/weights"


def test_records_are_what_other_tools_say(package: Path) -> None:
    records = open_bundle(package).manifest.files
    assert sorted(records) == sorted(files(package).keys() - {MANIFEST})
    for name, record in records.items():
        raw = (package / name).read_bytes()
        assert record.size_bytes == len(raw)
        assert record.sha256 == hashlib.sha256(raw).hexdigest()
    if program := shutil.which("sha256sum"):
        said = subprocess.run(
            [program, package / WEIGHTS], capture_output=True, text=True, check=True
        )
        assert said.stdout.split()[0] == records[WEIGHTS].sha256
    # What an app ships: neither manifest nor reference nor report.
    assert open_bundle(package).size_bytes() == 256_000 + len(b"model")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_only_the_artifact_that_was_measured_ships(
    manifest: Manifest, tmp_path: Path, kind: str
) -> None:
    artifact = tmp_path / "model"
    part = artifact if kind == "file" else artifact / "weights" / "weight.bin"
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(b"abc")
    assert manifest.budget is not None
    measured = msgspec.structs.replace(manifest.budget, artifact_sha256=artifact_digest(artifact))
    check_measured(artifact, measured)
    check_measured(artifact, None)
    part.write_bytes(b"abd")
    with pytest.raises(BuildError, match="model: not the bytes that the search measured"):
        check_measured(artifact, measured)
    part.write_bytes(b"abc")
    part.rename(part.with_name("other"))
    if kind == "folder":
        with pytest.raises(BuildError, match="not the bytes"):
            check_measured(artifact, measured)


def test_an_unchanged_bundle_passes(package: Path, tmp_path: Path) -> None:
    check_files(open_bundle(package))
    # It may be moved, and a note may lie beside the artifact.
    moved = package.rename(tmp_path / "moved")
    (moved / "note.txt").write_text("mine")
    check_files(open_bundle(moved))


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def link_away(file: Path) -> None:
    """The same content, but of a file that is elsewhere."""
    elsewhere = Path(f"{file.parents[2]}-elsewhere-{file.name}")
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


def change_into_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (flip, "does not match its sha256"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "truncated or changed"),
        (lambda file: file.write_bytes(b""), "has 0 bytes"),
        (lambda file: file.write_bytes(file.read_bytes() + b"\0"), "truncated or changed"),
        (Path.unlink, "is missing"),
        (change_into_folder, "is missing"),
        (link_away, "is a link"),
    ],
    ids=["flipped", "cut", "emptied", "longer", "missing", "folder", "link"],
)
@pytest.mark.parametrize("name", [WEIGHTS, REFERENCE, REPORT])
def test_a_changed_file(package: Path, change: Callable[[Path], object], says: str, name) -> None:
    change(package / name)
    with pytest.raises(TamperedError) as error:
        check_files(open_bundle(package))
    assert f"{package}: {name} " in one_line(error)
    assert says in str(error.value)


def add_file(package: Path) -> str:
    # A file before it by alphabet is not the one to name.
    (package / ".DS_Store").touch()
    (package / "eyelid-tiny.mlpackage" / "more").touch()
    return "eyelid-tiny.mlpackage/more is not in the manifest"


def add_link(package: Path) -> str:
    (package / "eyelid-tiny.mlpackage" / "Extra").symlink_to("/usr")
    return "eyelid-tiny.mlpackage/Extra is a link"


def link_package(package: Path) -> str:
    """Behind a link no file would be listed that was added."""
    artifact = package / "eyelid-tiny.mlpackage"
    artifact.rename(package.parent / "elsewhere")
    artifact.symlink_to(package.parent / "elsewhere")
    (package.parent / "elsewhere" / "more").touch()
    return "eyelid-tiny.mlpackage is a link"


@pytest.mark.parametrize("add", [add_file, add_link, link_package])
def test_an_added_file(package: Path, add: Callable[[Path], str]) -> None:
    says = add(package)
    with pytest.raises(TamperedError) as error:
        check_files(open_bundle(package))
    assert says in one_line(error)


@pytest.mark.parametrize("name", ["eyelid-tiny.mlpackage", REFERENCE])
def test_a_manifest_that_does_not_name_the_files(package: Path, name: str) -> None:
    """Otherwise whatever lies there would pass, as nothing is compared."""
    manifest = open_bundle(package).manifest
    kept = {file: r for file, r in manifest.files.items() if not file.startswith(name)}
    write_manifest(package, msgspec.structs.replace(manifest, files=kept))
    with pytest.raises(TamperedError) as error:
        check_files(open_bundle(package))
    assert f"the manifest holds no sha256 of {name}. Build it again." in one_line(error)


def test_what_is_no_bundle(tmp_path: Path, package: Path) -> None:
    for path in (tmp_path, tmp_path / "missing", package / MANIFEST):
        with pytest.raises(BundleError) as error:
            open_bundle(path)
        assert f"{path}: not a bundle (no manifest.json)" in one_line(error)


def test_a_huge_manifest_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / MANIFEST).open("wb") as file:
        # A sparse file: it takes no space, and would take this much memory.
        file.truncate(2**40)
    with pytest.raises(BundleError) as error:
        open_bundle(tmp_path)
    assert f"larger than {MAX_MANIFEST_BYTES} bytes" in one_line(error)


# --- the same bytes ------------------------------------------------------------------------------


@pytest.mark.e2e
def test_two_builds_of_the_same_inputs_give_the_same_bytes(
    built: Callable[[str, str], Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """This process has built other things before and has another hash seed than the second one."""
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    subprocess.run(
        [
            *(sys.executable, "-m", "dinoexport", "build", "--task", "eyelid", "--target", "all"),
            *("--checkpoint", str(tiny_checkpoint), "--out", str(tmp_path)),
        ],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": seed},
    )
    for target in ("onnx", "coreml", "tflite"):
        first = built(target, "fp16")
        second = tmp_path / first.name
        names = files(first).keys()
        assert {MANIFEST, REFERENCE, REPORT} < names
        assert files(second).keys() == names
        assert [name for name in names if files(first)[name] != files(second)[name]] == []
