"""Processes that make and that answer: results come back, and so do reasons."""

import numpy as np
import pytest

from dinobench.peers import cache
from dinobench.peers.cache import Folder
from dinobench.peers.candidates import OPENVINO_FP32, ROOFLINE, our_candidate
from dinobench.peers.roofline import ViTShape, gemm_model
from dinobench.peers.runners import MEAN, STD, prepare
from dinobench.peers.worker import Worker, WorkerError

TINY = ViTShape(width=8, depth=1, heads=2, hidden=16, patch=2)


def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3), np.uint8)


def test_a_worker_answers_in_a_process_of_its_own_and_takes_turns(tmp_path) -> None:
    onnx = pytest.importorskip("onnx")
    onnx.save(gemm_model(TINY, 6), tmp_path / ROOFLINE.file)
    worker = Worker(ROOFLINE, tmp_path, images())
    try:
        answers = worker.answers()
        turn = worker.turn(2)
    finally:
        worker.close()
    assert answers.shape == (2, 8)  # the first token of each image
    assert len(turn.wall_s) == len(turn.cpu_s) == 2
    assert min(turn.wall_s) > 0
    with pytest.raises(WorkerError):
        worker.turn(1)


def test_an_artifact_that_cannot_be_loaded_is_a_reason(tmp_path) -> None:
    (tmp_path / ROOFLINE.file).write_bytes(b"nothing")
    worker = Worker(ROOFLINE, tmp_path, images())
    try:
        with pytest.raises(WorkerError, match=r"gemm\.onnx"):
            worker.answers()
    finally:
        worker.close()


def test_pixels_are_prepared_as_each_side_reads_them() -> None:
    image = images()[0]
    ours = prepare(image, our_candidate("onnx", "fp32"))
    theirs = prepare(image, ROOFLINE)
    assert ours.dtype == np.uint8 and ours.shape == (1, 6, 6, 3)
    assert theirs.dtype == np.float32 and theirs.shape == (1, 3, 6, 6)
    row, column, channel = 4, 1, 2
    value = (image[row, column, channel] / 255 - MEAN[channel]) / STD[channel]
    assert theirs[0, channel, row, column] == pytest.approx(value, rel=1e-5)


def test_what_is_made_is_kept_until_its_digest_changes(tmp_path, monkeypatch) -> None:
    made: list[str] = []

    def make(folder, name, candidate) -> tuple[str, str]:
        made.append(name)
        (folder.path / candidate.file).write_bytes(b"artifact")
        return "a note", ""

    monkeypatch.setattr(cache, "make_apart", make)
    folder = Folder(path=tmp_path, size=28, hot=False)
    first = folder.make(ROOFLINE)
    assert first.note == "a note"
    assert folder.make(ROOFLINE) == first
    assert len(made) == 1

    monkeypatch.setattr(cache, "TOOLS", ("torch",))
    assert folder.make(ROOFLINE).digest != first.digest
    (tmp_path / ROOFLINE.file).unlink()
    folder.make(ROOFLINE)
    assert len(made) == 3


def test_what_cannot_be_made_is_a_reason_and_no_artifact(tmp_path) -> None:
    folder = Folder(path=tmp_path, size=28, hot=False)
    found = folder.make(OPENVINO_FP32)
    # It is made of ours, which is not there.
    assert "ours-onnx-fp32.onnx was not made" in found.reason
    assert not (tmp_path / OPENVINO_FP32.file).exists()
