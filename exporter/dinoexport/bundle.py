"""A bundle: artifact, manifest, reference and report in one folder, put in place in one step.

A killed build leaves the earlier bundle as it was; what it had half written lies in a hidden folder
that the next build removes. Where the file system cannot exchange two folders, the earlier bundle
has a hidden name for a moment; if the build is killed just then, the next one brings it back.
"""

import ctypes
import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from dinoexport.errors import BuildError, BundleError, TamperedError
from dinoexport.manifest import BudgetRecord, FileRecord, Manifest, decode_manifest, encode_manifest
from dinotrain.digests import digest

MANIFEST = "manifest.json"
REFERENCE = "reference.safetensors"
REPORT = "report.md"
LOCK = ".dinoexport.lock"
PARTIAL = ".dinoexport-partial-"
EARLIER = ".dinoexport-earlier-"
MAX_MANIFEST_BYTES = 4 * 2**20
_AGAIN = "Build it again."


@dataclass(frozen=True)
class Bundle:
    """An opened bundle, its manifest checked."""

    path: Path
    manifest: Manifest

    @property
    def artifact(self) -> Path:
        """The model file (a folder for Core ML)."""
        return self.path / self.manifest.artifact

    @property
    def reference(self) -> Path:
        """The reference that the bundle carries."""
        return self.path / REFERENCE

    def size_bytes(self) -> int:
        """Size of the artifact alone: what an app ships."""
        return artifact_size(self.manifest)


def artifact_size(manifest: Manifest) -> int:
    """Sum of the artifact's files, without manifest, reference and report."""
    return sum(
        record.size_bytes
        for file, record in manifest.files.items()
        if is_of_artifact(file, manifest.artifact)
    )


def is_of_artifact(file: str, artifact: str) -> bool:
    """True for an artifact's file, those within its folder, and its weights beside it."""
    return file in (artifact, f"{artifact}.data") or file.startswith(f"{artifact}/")


def artifact_digest(path: Path) -> str:
    """sha256 of an artifact, as hex: of its file, or over the names and digests of its files.

    Where weights lie beside the file, theirs follows behind a plus.
    """
    weights = path.with_name(f"{path.name}.data")
    if path.is_file():
        parts = [path, weights] if weights.is_file() else [path]
        return "+".join(digest(part) for part in parts)
    lines = [f"{name}={digest(path / name)}" for name in _files(path)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def check_measured(path: Path, budget: BudgetRecord | None) -> None:
    """Refuse an artifact that is not the one whose loss a search measured.

    Raises:
        BuildError: its bytes are others.
    """
    if budget is not None and artifact_digest(path) != budget.artifact_sha256:
        raise BuildError(
            f"{path.name}: not the bytes that the search measured, so its loss is not known. "
            "Remove the .search files from --out and search again."
        )


def open_bundle(path: Path) -> Bundle:
    """Read a bundle's manifest; the files are checked by ``check_files``.

    Raises:
        BundleError: no bundle there, or its manifest is not one.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise BundleError(
            f"{path}: not a bundle (no {MANIFEST}). Give the folder that `dinoexport build` wrote."
        )
    if file.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{file}: larger than {MAX_MANIFEST_BYTES} bytes; it is no manifest.")
    return Bundle(path, decode_manifest(file.read_bytes(), str(file)))


def check_files(bundle: Bundle) -> None:
    """Compare every file of a bundle with its digest.

    Raises:
        TamperedError: a file is missing, changed, truncated, a link, or not named in the manifest.
    """
    recorded = bundle.manifest.files
    artifact = bundle.manifest.artifact
    for name in (artifact, REFERENCE):
        if not any(file == name or file.startswith(f"{name}/") for file in recorded):
            raise TamperedError(f"{bundle.path}: the manifest holds no sha256 of {name}. {_AGAIN}")
    # What a link points to can change, and files behind the link of a folder would not be listed.
    parts = [bundle.path / name for name in recorded]
    for file in (bundle.artifact, *bundle.artifact.rglob("*"), *parts):
        if file.is_symlink():
            name = file.relative_to(bundle.path).as_posix()
            raise TamperedError(f"{bundle.path}: {name} is a link. {_AGAIN}")
    for name, record in recorded.items():
        file = bundle.path / name
        if not file.is_file():
            raise TamperedError(f"{bundle.path}: {name} is missing. {_AGAIN}")
        size = file.stat().st_size
        if size != record.size_bytes:
            raise TamperedError(
                f"{bundle.path}: {name} has {size} bytes, the manifest says {record.size_bytes}. "
                "It is truncated or changed; build it again."
            )
        if digest(file) != record.sha256:
            raise TamperedError(
                f"{bundle.path}: {name} does not match its sha256 in the manifest. "
                "It was changed; build it again."
            )
    extra = sorted(set(_files(bundle.path)) - recorded.keys() - {MANIFEST})
    added = [name for name in extra if is_of_artifact(name, artifact)]
    if added:
        raise TamperedError(
            f"{bundle.path}: {added[0]} is not in the manifest. It was added; build it again."
        )


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Digest and size of every file of a folder, by its relative name."""
    return {
        name: FileRecord(sha256=digest(folder / name), size_bytes=(folder / name).stat().st_size)
        for name in _files(folder)
        if name != MANIFEST
    }


@contextmanager
def lock_output(out: Path) -> Iterator[None]:
    """Own an output folder while building into it, and mend what killed builds left there.

    Raises:
        BuildError: another build owns it, or the folder cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / LOCK)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise BuildError(
            f"{out}: another build is writing into this folder. Wait for it, or give another --out."
        ) from error
    except OSError as error:
        raise BuildError(
            f"{out}: cannot build there: {_reason(error)}. Give another --out."
        ) from error
    try:
        _mend(out)
        yield
    finally:
        lock.release()


@contextmanager
def staged(out: Path, name: str) -> Iterator[Path]:
    """Give an empty folder; on success it becomes ``out/name`` in one step, else it vanishes.

    Raises:
        BuildError: the disk is full, or the folder cannot be written.
    """
    partial = out / f"{PARTIAL}{name}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        _flush(partial)
        _put_in_place(partial, out / name)
    except OSError as error:
        raise BuildError(
            f"{out / name}: cannot be written: {_reason(error)}. Free some space or give another "
            "--out; an earlier bundle there is unchanged."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``."""
    (folder / MANIFEST).write_bytes(encode_manifest(manifest))


def _files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _flush(folder: Path) -> None:
    """Bring the files to the disk before they get their final name."""
    for name in _files(folder):
        with (folder / name).open("rb") as handle:
            os.fsync(handle.fileno())


def _mend(out: Path) -> None:
    """Clear what killed builds left, and give earlier bundles their name back where it is free."""
    for partial in out.glob(f"{PARTIAL}*"):
        shutil.rmtree(partial, ignore_errors=True)
    for earlier in out.glob(f"{EARLIER}*"):
        destination = out / earlier.name.removeprefix(EARLIER)
        if destination.exists():
            shutil.rmtree(earlier, ignore_errors=True)
        else:
            with suppress(OSError):
                earlier.rename(destination)


def _put_in_place(source: Path, destination: Path) -> None:
    if not destination.exists():
        source.rename(destination)
        return
    if not destination.is_dir() or destination.is_symlink():
        raise FileExistsError(errno.EEXIST, "a file of that name is in the way")
    if any(destination.iterdir()) and not (destination / MANIFEST).is_file():
        raise FileExistsError(errno.EEXIST, "a folder of that name that is no bundle is in the way")
    if _exchange(source, destination):
        shutil.rmtree(source, ignore_errors=True)
        return
    # Where two folders cannot be exchanged, the old one steps aside and comes back on failure.
    aside = destination.with_name(f"{EARLIER}{destination.name}")
    try:
        destination.rename(aside)
        source.rename(destination)
    except BaseException:
        if aside.exists() and not destination.exists():
            aside.rename(destination)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step where the system can (Linux renameat2, macOS renamex_np)."""
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None, use_errno=True)
        a, b = os.fsencode(first), os.fsencode(second)
        if sys.platform == "darwin":
            return library.renamex_np(a, b, 2) == 0
        if sys.platform.startswith("linux"):
            return library.renameat2(-100, a, -100, b, 2) == 0
    return False


def _reason(error: OSError) -> str:
    """Say in one line what the system says, without the path that its text may hold."""
    text = str(error.args[-1]) if error.args else type(error).__name__
    return " ".join((error.strerror or text).split())
