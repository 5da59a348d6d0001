"""A temporary folder that is too small is refused: LLVM would end the process without a word."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from dinoexport.errors import BuildError
from dinoexport.targets.tflite import lower

MIB = 2**20


def test_a_small_temporary_folder_is_refused(tmp_path: Path, monkeypatch) -> None:
    def free(mib: int) -> None:
        usage = (200 * MIB, (200 - mib) * MIB, mib * MIB)
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(*usage))

    free(96)
    lower._check_space(tmp_path / "work", 64 * MIB)
    free(95)
    with pytest.raises(BuildError) as error:
        lower._check_space(tmp_path / "work", 64 * MIB)
    assert str(error.value) == (
        f"tflite: {tmp_path}: 95 MiB free, the converter needs about 96 there. "
        "Free some space or set TMPDIR to another folder."
    )


def test_it_is_asked_before_the_converter(monkeypatch) -> None:
    """Afterwards there is no process left to ask."""
    order: list[str] = []

    def full(_folder: Path, _weight_bytes: int) -> None:
        order.append("space")
        raise BuildError("full")

    monkeypatch.setattr(lower, "_check_space", full)
    monkeypatch.setattr(lower, "NhwcAdaptor", lambda *_: None)
    monkeypatch.setattr(lower.litert_torch, "convert", lambda *_, **__: order.append("convert"))
    facts = {"input_names": (), "output_names": (), "program": None, "weight_bytes": MIB}
    program: Any = type("Captured", (), facts)()
    with pytest.raises(BuildError, match="full"):
        lower.lower(program)
    assert order == ["space"]
