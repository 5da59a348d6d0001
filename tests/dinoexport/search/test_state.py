"""A search is resumed from what fits, and from nothing else."""

import pytest

from dinoexport.search.front import Candidate
from dinoexport.search.state import Measured, SearchState, load_state, save_state
from dinotrain.errors import UsageError

FULL = SearchState(
    key="a",
    noise={"w8": {"head": 0.5}},
    drops={"w8:head=fp16": 0.01},
    targets={
        "onnx": Measured(
            candidates={
                "w8": Candidate(recipe="w8", size_bytes=5, sha256="0", error=0.1, latency_ms=None)
            },
            refused={"pal4": "no"},
        )
    },
)


def test_a_state_comes_back(tmp_path) -> None:
    save_state(tmp_path / "s.json", FULL)
    assert load_state(tmp_path / "s.json", "a") == FULL
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"]


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b'{"key": "a", "more": 1}', b'{"key": "a", "format_version": 0}']
)
def test_what_does_not_fit_is_measured_again(tmp_path, raw: bytes) -> None:
    (tmp_path / "s.json").write_bytes(raw)
    assert load_state(tmp_path / "s.json", "a") == SearchState(key="a")


def test_another_key_is_another_search(tmp_path) -> None:
    save_state(tmp_path / "s.json", FULL)
    assert load_state(tmp_path / "s.json", "b") == SearchState(key="b")
    assert load_state(tmp_path / "none.json", "b") == SearchState(key="b")


def test_a_folder_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be recorded there"):
        save_state(tmp_path / "file" / "s.json", FULL)
