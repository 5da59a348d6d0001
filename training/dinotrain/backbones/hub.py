"""Published backbones by name: fetched once, kept in the Hugging Face cache, digest checked.

``weights.load_backbone`` asks here for a file when its source is a name. A cached file that was
verified before needs no network.
"""

import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from dinotrain.errors import DownloadError, UsageError, unknown_name

FILE = "model.safetensors"
SIDECAR = "dinoexport-verified.json"
SHA256 = re.compile(r"[0-9a-f]{64}")
CHUNK_BYTES = 1 << 20

_SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant"}
REPOSITORIES: dict[str, str] = {
    f"dinov2_vit{letter}14{suffix}": f"facebook/dinov2-{middle}{size}"
    for suffix, middle in (("", ""), ("_reg", "with-registers-"))
    for letter, size in _SIZES.items()
}
"""Hub name → repository of DINOv2; those of ``convnets`` are in ``convnets/published.py``."""


class Verified(msgspec.Struct, frozen=True):
    """A digest that a file was found to have, while it had this size and time of change."""

    sha256: str
    size_bytes: int
    mtime_ns: int


def fetch(
    source: str,
    *,
    repositories: Mapping[str, str] = REPOSITORIES,
    cache_dir: str | Path | None = None,
    endpoint: str | None = None,
) -> Path:
    """Return the local file of a published backbone, downloading it at first use.

    A dropped connection resumes where it broke off; a killed program starts anew. The library
    shows its progress bar on a terminal only. The file's SHA-256 is compared with the one
    that the hub declares, once, and again whenever its size or time of change differ.

    Args:
        source: a hub name, optionally pinned: ``dinov2_vits14@sha256:<64 hex digits>``.
        repositories: hub name → repository; DINOv2's unless given.
        cache_dir: Hugging Face's own cache unless given.
        endpoint: the hub's address; ``HF_ENDPOINT`` or the library's default unless given.

    Raises:
        UsageError: an unknown name, or a pin that is no SHA-256.
        DownloadError: the hub cannot be reached, or a digest is wrong; a file that is not what
            the hub declares is deleted.
    """
    from huggingface_hub import try_to_load_from_cache

    name, pin = _parse(source, repositories)
    repository = repositories[name]
    cached = try_to_load_from_cache(repository, FILE, cache_dir=cache_dir)
    if isinstance(cached, str):
        path = Path(cached)
        declared = _declared_in_cache(path) or _declared_by_hub(repository, endpoint)
        _check_pin(name, pin, declared)
    else:
        # The pin is held against the hub's word first: a wrong one costs no download.
        declared = _declared_by_hub(repository, endpoint)
        _check_pin(name, pin, declared)
        path = _download(repository, cache_dir, endpoint)
    _verify(path, declared, repository)
    return path


def _parse(source: str, repositories: Mapping[str, str]) -> tuple[str, str | None]:
    name, at, pin = source.partition("@")
    if name not in repositories:
        raise unknown_name("backbone", name, repositories)
    if not at:
        return name, None
    digest = pin.removeprefix("sha256:").lower()
    if not pin.startswith("sha256:") or not SHA256.fullmatch(digest):
        raise UsageError(f"'{pin}' pins no digest. Write {name}@sha256:<64 hex digits>.")
    return name, digest


def _check_pin(name: str, pin: str | None, declared: str) -> None:
    if pin is not None and pin != declared:
        raise DownloadError(
            f"{name} is pinned to sha256 {pin}, the hub's file has {declared}. "
            "Change the pin, or pass a local file with --backbone FILE."
        )


def _declared_by_hub(repository: str, endpoint: str | None) -> str:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(repository, FILE, endpoint=endpoint)
    try:
        etag = get_hf_file_metadata(url, endpoint=endpoint).etag or ""
    # The library's network errors have no base class in common, and change with its version.
    except Exception as error:
        raise _unreachable(repository, error) from error
    if not SHA256.fullmatch(etag):
        raise DownloadError(
            f"{repository}/{FILE}: the hub declares no sha256 but '{etag}', so that the file "
            "cannot be verified. Pass a local file with --backbone FILE."
        )
    return etag


def _declared_in_cache(path: Path) -> str | None:
    """Return what the hub declared when it was fetched: the blob's name, else the sidecar's."""
    # The cache names a blob by its digest and links to it, where the system has links.
    blob = path.resolve().name
    if SHA256.fullmatch(blob):
        return blob
    verified = _read_sidecar(path)
    return verified.sha256 if verified else None


def _download(repository: str, cache_dir: str | Path | None, endpoint: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, FILE, cache_dir=cache_dir, endpoint=endpoint))
    except Exception as error:
        raise _unreachable(repository, error) from error


def _unreachable(repository: str, error: Exception) -> DownloadError:
    lines = str(error).strip().splitlines()
    reason = lines[0][:200].rstrip(".") if lines else type(error).__name__
    return DownloadError(
        f"{repository}/{FILE} could not be downloaded ({reason}). "
        "Connect and repeat, or pass a local file with --backbone FILE."
    )


def _verify(path: Path, declared: str, repository: str) -> None:
    """Compare a file's digest with the declared one, unless that was done for this very file."""
    stat = path.stat()
    if _read_sidecar(path) == Verified(declared, stat.st_size, stat.st_mtime_ns):
        return
    found = sha256_of(path)
    if found != declared:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise DownloadError(
            f"{repository}/{FILE} has sha256 {found}, the hub declares {declared}. "
            "The file was deleted; repeat the command to fetch it again."
        )
    _write_sidecar(path, Verified(declared, stat.st_size, stat.st_mtime_ns))


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 as 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _sidecar(path: Path) -> Path:
    # <repository>/snapshots/<commit>/<file>: the cache ignores files beside its snapshots.
    return path.parents[2] / SIDECAR


def _read_sidecar(path: Path) -> Verified | None:
    with suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode(_sidecar(path).read_bytes(), type=Verified)
    return None


def _write_sidecar(path: Path, verified: Verified) -> None:
    # A cache that is read-only still serves; the digest is then computed at each start.
    with suppress(OSError):
        part = _sidecar(path).with_suffix(".part")
        part.write_bytes(msgspec.json.encode(verified))
        part.replace(_sidecar(path))
