"""Weights in a file: the same numbers and bundles, no memory while they rest, and a full disk."""

import re
import tempfile
from pathlib import Path

import pytest
import torch

from dinoexport.bundle import artifact_digest, open_bundle
from dinoexport.console import Reporter
from dinoexport.graph import spill
from dinoexport.graph.capture import CapturedProgram, capture
from dinoexport.graph.spill import spill_
from dinoexport.pipeline import build
from dinoexport.plan import BuildRequest

RECIPE = "w8:blocks.1.mlp=pal4"


@pytest.fixture
def small(monkeypatch) -> None:
    """Nothing is too small for the file."""
    monkeypatch.setattr(spill, "WORTH_BYTES", 0)
    monkeypatch.setattr(spill, "_LEAST_BYTES", 1)


@pytest.fixture
def program(random_model) -> CapturedProgram:
    return capture(random_model(), RECIPE)


def weights(program: CapturedProgram) -> dict[str, torch.Tensor]:
    both = {"program": program.program, "debug": program.debug_program}
    return {
        f"{which} {name}": value
        for which, exported in both.items()
        for name, value in exported.state_dict.items()
    }


def resident_kib(program: CapturedProgram) -> int:
    """Memory that the file's pages take in this process."""
    address = next(iter(program.program.state_dict.values())).data_ptr()
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1])
    raise LookupError("no such mapping")


def test_numbers_stay_the_same(small, program) -> None:
    before = {name: value.clone() for name, value in weights(program).items()}
    codes = {n: x.stored.codes.copy() for n, x in program.layers.items() if x.stored is not None}
    spilled = spill_(program)
    for _ in range(2):
        for name, value in weights(spilled).items():
            assert torch.equal(value, before[name]), name
        for name, expected in codes.items():
            found = spilled.layers[name].stored.codes
            assert found.dtype == expected.dtype and (found == expected).all(), name
        spilled.rest()


def test_arrays_of_two_sizes_may_start_at_one_place(small, program) -> None:
    state = program.debug_program.state_dict
    name, whole = next((n, x.detach()) for n, x in state.items() if x.dim() == 2 and len(x) > 1)
    state["front"] = whole[:1]
    expected = whole.clone()
    spilled = weights(spill_(program))
    assert torch.equal(spilled["debug front"], expected[:1])
    assert torch.equal(spilled[f"debug {name}"], expected)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's smaps")
def test_what_rests_takes_no_memory_until_it_is_read(small, program) -> None:
    spilled = spill_(program)
    total = sum(float(value.sum()) for value in weights(spilled).values())
    read = resident_kib(spilled)
    assert 1024 * read >= spilled.weight_bytes
    spilled.rest()
    assert resident_kib(spilled) == 0
    assert sum(float(value.sum()) for value in weights(spilled).values()) == total
    assert resident_kib(spilled) > 0.5 * read


def test_little_stays_in_memory(program) -> None:
    assert program.weight_bytes < spill.WORTH_BYTES
    assert spill_(program) is program
    program.rest()


def test_a_full_disk_costs_memory_and_no_build(small, program, monkeypatch) -> None:
    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    before = {name: value.clone() for name, value in weights(program).items()}
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    assert spill_(program) is program
    assert all(torch.equal(value, before[name]) for name, value in weights(program).items())


@pytest.mark.e2e
def test_artifacts_have_the_same_bytes(tiny_checkpoint, tmp_path, monkeypatch) -> None:
    def artifacts(out: Path) -> dict[str, str]:
        request = BuildRequest("eyelid", "all", out, tiny_checkpoint, "w8")
        bundles = build(request, Reporter(enabled=False)).bundles
        return {b.target: artifact_digest(open_bundle(b.path).artifact) for b in bundles}

    plain = artifacts(tmp_path / "plain")
    monkeypatch.setattr(spill, "WORTH_BYTES", 0)
    monkeypatch.setattr(spill, "_LEAST_BYTES", 1)
    assert artifacts(tmp_path / "spilled") == plain
    assert len(plain) == 3
