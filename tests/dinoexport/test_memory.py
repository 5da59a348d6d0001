"""What cannot end well is refused before work starts: memory, disk, and formats of 2 GB."""

import gc
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dinoexport import pipeline
from dinoexport.console import Reporter
from dinoexport.errors import BuildError
from dinoexport.memory import WORTH_BYTES, free_bytes, release
from dinoexport.pipeline import LEAST_COPIES, build
from dinoexport.plan import BuildRequest, plan_build
from dinoexport.targets.tflite import graph


def weights(path: Path) -> int:
    return sum(4 * tensor.size for tensor in load_file(path).values())


def test_the_system_is_asked() -> None:
    free = free_bytes()
    assert free is None or 2**20 < free < 2**50


class Cycle:
    """Refers to itself, as converters' graphs do, and holds memory."""

    def __init__(self, size_bytes: int) -> None:
        self.own = self
        self.held = np.ones(size_bytes, np.uint8)


def test_what_nothing_refers_to_goes_back_where_it_is_much() -> None:
    gc.collect()
    gc.disable()
    try:
        held = weakref.ref(Cycle(WORTH_BYTES))
        release(WORTH_BYTES - 1)
        assert held() is not None
        release(WORTH_BYTES)
        assert held() is None
    finally:
        gc.enable()


@pytest.fixture
def request_(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> BuildRequest:
    """A build that ends with LookupError once it loads."""

    def load(_plan) -> None:
        raise LookupError("loading")

    monkeypatch.setattr(pipeline, "load_model", load)
    return BuildRequest("eyelid", "onnx", tmp_path, tiny_checkpoint, "fp16")


@pytest.mark.parametrize("short", [0, 1])
def test_too_little_memory_is_refused_before_anything_is_loaded(
    request_: BuildRequest, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, short: int
) -> None:
    needed = LEAST_COPIES * weights(tiny_checkpoint)
    monkeypatch.setattr(pipeline, "free_bytes", lambda: needed - short)
    with pytest.raises(BuildError if short else LookupError) as error:
        build(request_, Reporter(enabled=False))
    if short:
        assert "of memory free, and a build of this model needs at least" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("short", [0, 1])
def test_a_full_folder_is_refused_before_anything_is_loaded(
    request_: BuildRequest, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, short: int
) -> None:
    # Three targets in float32, and 32 MiB for what comes with them.
    free = 3 * weights(tiny_checkpoint) + 32 * 2**20 - short
    usage = shutil._ntuple_diskusage(2 * free, free, free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(BuildError if short else LookupError) as error:
        build(request_, Reporter(enabled=False))
    if short:
        assert str(error.value).startswith(
            f"{request_.out}: {free / 2**20:.0f} MiB free, a build needs"
        )
        assert str(error.value).endswith("Free some space or give another --out.")


def test_a_plan_says_what_a_format_cannot_hold(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(target: str) -> tuple[str, ...]:
        return plan_build(BuildRequest("eyelid", target, tmp_path, tiny_checkpoint)).targets

    monkeypatch.setattr(graph, "MAX_BYTES", weights(tiny_checkpoint))
    assert plan("all") == ("onnx", "coreml", "tflite")
    monkeypatch.setattr(graph, "MAX_BYTES", weights(tiny_checkpoint) - 1)
    assert plan("onnx,coreml") == ("onnx", "coreml")
    with pytest.raises(BuildError, match=r"a flatbuffer holds 2\. Use --target onnx,coreml"):
        plan("all")
