"""Entries of frozen features on disk, one file per picture: mapped into memory, never believed.

``FeatureStore`` names an entry by a digest over all that its numbers depend on; here an entry is
kept, and given back only if it is what was written under that name. Source: METHODS B7.
"""

import hashlib
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dinotrain.errors import ShapeError, UsageError

Precision = Literal["float32", "float16"]
DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "float16": torch.float16}
SMALL_BYTES = 64 * 1024
"""Entries up to this size are copied: a map takes whole pages, and Linux allows 65,530 of them."""
RETRIES = 5
"""Of a read, while other processes write the same entry."""

_KEY = re.compile(r"[0-9a-f]{64}")
_Stamp = tuple[int, int, int]


class FeatureCache:
    """A folder of entries, each the features of one picture: one tensor, or several.

    An entry is ``folder/dtype/key[:2]/key.safetensors``, so that precisions never mix. The file
    carries a digest over its key and its tensors; it is compared when this process first meets the
    file, and again if the file was replaced since. What does not agree is no entry.

    float32 entries above 64 KiB are views of the mapped file: their pages are read when touched,
    belong to the file cache, and can be dropped by the system. Writing to such a tensor changes
    neither file nor entry. Each one that is alive takes one of the maps that a process may have.
    float16 entries take half of the disk; each ``get`` makes a float32 copy in memory, and every
    number is rounded to 11 bits (relative error at most 2⁻¹¹ above 6·10⁻⁵).

    Args:
        folder: made when first written to; processes and threads may share it.
        dtype: how numbers are stored.
    """

    def __init__(self, folder: Path, dtype: Precision = "float32") -> None:
        self.folder = folder
        self.dtype: Precision = dtype
        self._seen: dict[str, _Stamp] = {}

    def entry(self, key: str) -> Path:
        """Return the file of a key.

        Raises:
            UsageError: ``key`` is no sha256 in lower-case hex.
        """
        if not _KEY.fullmatch(key):
            raise UsageError(f"'{key}' is no key of features; a sha256 as 64 hex digits is one")
        return self.folder / self.dtype / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> tuple[Tensor, ...] | None:
        """Return what was put under a key: float32, on the CPU.

        None is given for whatever is missing, partial, damaged, of another key, not this
        program's, or replaced by others during every one of ``RETRIES`` reads.
        """
        path = self.entry(key)
        stamp = _stamp(path)
        found = self._read(path, key, known=self._seen.get(key) == stamp)
        # safetensors opens a file twice: what was replaced meanwhile is read again.
        for _ in range(RETRIES):
            before, stamp = stamp, _stamp(path)
            if stamp == before:
                break
            found = self._read(path, key, known=False)
        else:
            found = None
        if found is None or stamp is None:
            self._seen.pop(key, None)
            return None
        self._seen[key] = stamp
        # Of a half-precision entry ``float`` is the copy already.
        copied = self.dtype == "float32" and sum(value.nbytes for value in found) <= SMALL_BYTES
        return tuple(value.clone() if copied else value.float() for value in found)

    def put(self, key: str, tensors: Sequence[Tensor]) -> None:
        """Write an entry in one step; of two processes that write a key, the last one's stays.

        Args:
            key: sha256 as hex, over all that the numbers depend on.
            tensors: one or more, of any shape and device; stored as ``dtype``.

        Raises:
            UsageError: the folder cannot be written, or a number is beyond half precision.
            ShapeError: no tensor is given.
        """
        path = self.entry(key)
        if not tensors:
            raise ShapeError("an entry of features holds at least one tensor; none was given")
        # Copies, because a file refuses tensors that share memory.
        stored = [t.detach().to("cpu", DTYPES[self.dtype], copy=True).contiguous() for t in tensors]
        if self.dtype == "float16":
            _check_range(tensors, stored)
        named = {str(index): value for index, value in enumerate(stored)}
        # Not tempfile's, which only its owner could read: a cache may be shared.
        partial = path.with_name(f".{key}-{uuid.uuid4().hex}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                save_file(named, partial, metadata={"sha256": _digest(key, stored)})
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            raise UsageError(
                f"{self.folder}: features cannot be cached there ({error}). Free some space, or "
                "name another folder with --cache."
            ) from error

    def _read(self, path: Path, key: str, known: bool) -> list[Tensor] | None:
        """Map the tensors of a file; None where they are not what was written.

        Args:
            path: of the file, which need not be there.
            key: of the entry.
            known: the digest of this very file agreed before.
        """
        try:
            with safe_open(path, framework="pt") as file:
                count = len(file.keys())
                found = [file.get_tensor(str(index)) for index in range(count)]
                stated = (file.metadata() or {}).get("sha256")
        # The header of a foreign file may hold anything: torch refuses odd shapes and dtypes.
        except (SafetensorError, OSError, ValueError, TypeError, OverflowError, RuntimeError):
            return None
        if not found or any(value.dtype != DTYPES[self.dtype] for value in found):
            return None
        return found if known or stated == _digest(key, found) else None


def _stamp(path: Path) -> _Stamp | None:
    """Which file lies at a path: it differs once another one was put there; None for none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _digest(key: str, tensors: Sequence[Tensor]) -> str:
    """sha256 over a key, and over dtype, shape and bytes of contiguous tensors, as hex."""
    total = hashlib.sha256(key.encode())
    for value in tensors:
        total.update(f"|{value.dtype}|{tuple(value.shape)}|".encode())
        # A view of the mapped file: nothing is copied.
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _check_range(tensors: Sequence[Tensor], stored: Sequence[Tensor]) -> None:
    if all(bool(value.isfinite().all()) for value in stored):
        return
    largest = max(float(value.abs().max()) for value in tensors if value.numel())
    raise UsageError(
        f"features reach {largest:g}; half precision holds up to {torch.finfo(torch.half).max:g}. "
        "Store them as float32."
    )
