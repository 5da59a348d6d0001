"""What a study's folder remembers: what the study is, and a line per finished run.

study.json     what the folder holds; anything else is refused
results.jsonl  one finished run per line, with its test metrics and predictions
runs/          a checkpoint per run, and the state of the run that was cut off
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from filelock import FileLock, Timeout

from dinotrain.errors import DataError, UsageError

IDENTITY, RESULTS, LOCK = "study.json", "results.jsonl", ".study.lock"


class RunRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One finished run, judged on the test split."""

    group: str
    variant: str
    seed: int
    metrics: dict[str, Any]
    """{output: what the task's ``evaluate`` gives}."""
    names: list[str]
    """Of the test samples."""
    predicted: dict[str, list[float | None]]
    """{output: a value per test sample}, of the outputs in ``metrics``."""
    best_epoch: int
    epochs: int
    """That were trained."""
    stopped: str
    fingerprint: str
    """Of the data, splits included."""
    backbone: str
    trained_on: str
    notice: str
    versions: dict[str, str]
    seconds: float | None = None
    """That this process took for it; None where the checkpoint was there already."""


class Ledger:
    """The records of a folder.

    Args:
        folder: of the study; made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / RESULTS

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep other processes out of the folder.

        Raises:
            UsageError: one is in it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UsageError(
                f"{self.folder}: another study is running in this folder. Wait for it, or give "
                "another --out."
            ) from error
        try:
            yield
        finally:
            lock.release()

    def claim(self, identity: dict[str, Any]) -> None:
        """Say what the folder holds, or check that it holds just that.

        Args:
            identity: nested; what is not known yet may be left out and claimed later.

        Raises:
            UsageError: the folder holds another study, or other files; the first choice that
                differs is named.
            DataError: its description cannot be read.
        """
        file = self.folder / IDENTITY
        wanted = _flat(msgspec.json.decode(msgspec.json.encode(identity)))
        before = self._identity(file)
        for key in sorted(before.keys() & wanted.keys()):
            if before[key] != wanted[key]:
                raise UsageError(
                    f"{self.folder} holds a study with {key} = {before[key]}, this one has "
                    f"{wanted[key]}. Run it with the same choices, or give another --out."
                )
        if before.keys() >= wanted.keys():
            return
        _replace(file, msgspec.json.format(msgspec.json.encode(before | wanted)) + b"\n")

    def _identity(self, file: Path) -> dict[str, Any]:
        if not file.is_file():
            others = [path.name for path in self.folder.iterdir() if path.name != LOCK]
            if others:
                raise UsageError(
                    f"{self.folder} is not empty and holds no study ({min(others)}). Give a new or "
                    "empty folder with --out."
                )
            return {}
        try:
            return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
        except msgspec.MsgspecError as error:
            raise DataError(
                f"{file} cannot be read: {error}. Give another --out, or delete the folder."
            ) from error

    def read(self) -> list[RunRecord]:
        """Return the finished runs.

        Raises:
            DataError: a line is no record.
        """
        if not self.file.is_file():
            return []
        records = []
        for number, line in enumerate(self.file.read_bytes().splitlines(), start=1):
            try:
                records.append(msgspec.json.decode(line, type=RunRecord))
            except msgspec.MsgspecError as error:
                raise DataError(
                    f"{self.file} line {number} is no record of a run: {error}. Delete the line: "
                    "the run is read from its checkpoint, or trained again."
                ) from error
        return records

    def write(self, records: list[RunRecord]) -> None:
        """Write all finished runs in one step: a killed process leaves no half line."""
        _replace(self.file, b"".join(msgspec.json.encode(record) + b"\n" for record in records))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{path of keys: leaf}, so that a difference can be named."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        path: leaf
        for key, inner in value.items()
        for path, leaf in _flat(inner, f"{prefix}: {key}" if prefix else str(key)).items()
    }


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
