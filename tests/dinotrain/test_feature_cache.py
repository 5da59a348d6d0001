"""Entries of features: exact, mapped, written in one step, and none of them believed."""

import hashlib
import json
import multiprocessing
import os
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dinotrain.errors import ShapeError, UsageError
from dinotrain.feature_cache import SMALL_BYTES, FeatureCache

KEY = hashlib.sha256(b"a picture").hexdigest()
OTHER = hashlib.sha256(b"another picture").hexdigest()
MEBI = 2**20


@pytest.fixture
def tensors() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(16,), (3, 4, 5), ()]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def equal(found, wanted) -> bool:
    return found is not None and all(map(torch.equal, found, wanted)) and len(found) == len(wanted)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_was_put_is_got(tensors, tmp_path, dtype):
    cache = FeatureCache(tmp_path / "new" / "folder", dtype)
    assert cache.get(KEY) is None
    cache.put(KEY, tensors)
    wanted = [t if dtype == "float32" else t.half().float() for t in tensors]
    for reader in (cache, cache, FeatureCache(cache.folder, dtype)):
        found = reader.get(KEY)
        assert equal(found, wanted)
        assert all(value.dtype == torch.float32 for value in found)
    assert cache.entry(KEY) == cache.folder / dtype / KEY[:2] / f"{KEY}.safetensors"
    assert cache.get(OTHER) is None
    assert not list(tmp_path.rglob("*.part"))


def test_precisions_never_mix(tensors, tmp_path):
    full, half = FeatureCache(tmp_path), FeatureCache(tmp_path, "float16")
    full.put(KEY, tensors)
    assert half.get(KEY) is None
    half.put(KEY, tensors)
    assert equal(full.get(KEY), tensors)
    assert half.entry(KEY).stat().st_size < full.entry(KEY).stat().st_size
    # Even a file that was moved by hand is not taken for the other one.
    shutil.copy(half.entry(KEY), full.entry(KEY))
    assert full.get(KEY) is None
    full.put(KEY, tensors)
    shutil.copy(full.entry(KEY), half.entry(KEY))
    assert half.get(KEY) is None


def test_a_tensor_of_any_layout_is_kept(tmp_path):
    cache = FeatureCache(tmp_path)
    base = torch.arange(12.0).reshape(3, 4)
    views = (base, base.T, base[1:, ::2], base[0].expand(2, 4), base.double().requires_grad_())
    cache.put(KEY, views)
    assert equal(cache.get(KEY), [view.detach().float() for view in views])
    cache.put(OTHER, [torch.zeros(0, 3)])
    assert cache.get(OTHER)[0].shape == (0, 3)


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def rename_tensors(path: Path) -> None:
    """Claim more tensors than were written, under names that are not theirs."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header["first"] = header.pop("0")
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def reshape(path: Path) -> None:
    """Same bytes, another shape; the header keeps its length."""
    path.write_bytes(path.read_bytes().replace(b"[3,4,5]", b"[4,3,5]"))


def fewer(path: Path) -> None:
    save_file({"0": torch.zeros(16)}, path, metadata={"sha256": "0" * 64})


DAMAGES = {
    "one bit": lambda path: flip(path, -3),
    "one bit of the header": lambda path: flip(path, 30),
    "partial": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "header only": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "text": lambda path: path.write_text("hello, these are no features"),
    "other names": rename_tensors,
    "other shape": reshape,
    "other count": fewer,
    "no digest": lambda path: save_file({"0": torch.zeros(16)}, path),
    "no tensor": lambda path: save_file({}, path),
    "other numbers": lambda path: save_file({"0": torch.arange(16)}, path),
    "gone": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("met_before", [False, True], ids=["unmet", "met"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_entry_is_none(tensors, tmp_path, damage, met_before):
    cache = FeatureCache(tmp_path)
    cache.put(KEY, tensors)
    if met_before:
        assert cache.get(KEY) is not None
        # A coarse clock could give the damaged file the same time of change.
        os.utime(cache.entry(KEY), ns=(1, 1))
    damage(cache.entry(KEY))
    assert cache.get(KEY) is None
    if cache.entry(KEY).is_dir():
        return
    cache.put(KEY, tensors)
    assert equal(cache.get(KEY), tensors)


def test_a_swapped_entry_is_none(tensors, tmp_path):
    cache = FeatureCache(tmp_path)
    cache.put(KEY, tensors)
    cache.put(OTHER, [t + 1 for t in tensors])
    first, second = (cache.entry(key).read_bytes() for key in (KEY, OTHER))
    cache.entry(KEY).write_bytes(second)
    cache.entry(OTHER).write_bytes(first)
    assert cache.get(KEY) is None
    assert cache.get(OTHER) is None


def test_no_flipped_bit_is_ever_served(tmp_path):
    """Every byte of a whole file, header included: either None, or what was written."""
    cache = FeatureCache(tmp_path)
    wanted = [torch.arange(4.0), torch.ones(2, 2)]
    cache.put(KEY, wanted)
    sound = cache.entry(KEY).read_bytes()
    refused = 0
    for place in range(len(sound)):
        cache.entry(KEY).write_bytes(sound)
        flip(cache.entry(KEY), place)
        found = FeatureCache(tmp_path).get(KEY)
        assert found is None or equal(found, wanted), place
        refused += found is None
    # Blanks that pad the header may become other blanks; all else must be noticed.
    assert refused > 0.9 * len(sound)


def test_the_digest_is_taken_once_per_file(tensors, tmp_path, monkeypatch):
    calls = []
    digest = sys.modules[FeatureCache.__module__]._digest
    monkeypatch.setattr(
        f"{FeatureCache.__module__}._digest", lambda *args: calls.append(1) or digest(*args)
    )
    FeatureCache(tmp_path).put(KEY, tensors)
    cache = FeatureCache(tmp_path)
    calls.clear()
    for _ in range(3):
        assert equal(cache.get(KEY), tensors)
    assert len(calls) == 1
    FeatureCache(tmp_path).put(KEY, tensors)
    calls.clear()
    assert equal(cache.get(KEY), tensors)
    assert len(calls) == 1, "another file is another entry to judge"


def is_mapped(value: torch.Tensor, file: Path) -> bool:
    """Whether all numbers of a tensor lie where this process has mapped a file."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if file.name in line]
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    first, last = value.data_ptr(), value.data_ptr() + value.nbytes
    return any(start <= first and last <= end for start, end in spans)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_entry_is_mapped_and_not_read_into_memory(tmp_path):
    size = 64 * MEBI
    cache = FeatureCache(tmp_path)
    cache.put(KEY, [torch.ones(size // 4)])
    found = cache.get(KEY)
    assert float(found[0].sum()) == size // 4
    # Addresses, and not the process's memory: what other tests freed may serve a copy unseen.
    assert is_mapped(found[0], cache.entry(KEY))
    assert not is_mapped(found[0].clone(), cache.entry(KEY))
    del found
    assert cache.entry(KEY).name not in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_small_entries_take_no_map_and_no_file_handle(tmp_path):
    cache = FeatureCache(tmp_path)
    cache.put(KEY, [torch.zeros(SMALL_BYTES // 4)])
    cache.put(OTHER, [torch.zeros(SMALL_BYTES // 4 + 1)])
    handles = len(list(Path("/proc/self/fd").iterdir()))
    held = [cache.get(key) for _ in range(20) for key in (KEY, OTHER)]
    maps = Path("/proc/self/maps").read_text()
    assert KEY not in maps
    assert OTHER in maps
    assert len(list(Path("/proc/self/fd").iterdir())) == handles
    assert len(held) == 40


def test_writing_to_what_was_got_changes_no_entry(tmp_path):
    cache = FeatureCache(tmp_path)
    wanted = torch.zeros(SMALL_BYTES)
    cache.put(KEY, [wanted])
    cache.get(KEY)[0].add_(1)
    assert equal(cache.get(KEY), [wanted])
    assert equal(FeatureCache(tmp_path).get(KEY), [wanted])


def test_a_mapped_entry_outlives_its_replacement(tmp_path):
    cache = FeatureCache(tmp_path)
    cache.put(KEY, [torch.zeros(SMALL_BYTES)])
    held = cache.get(KEY)
    cache.put(KEY, [torch.ones(SMALL_BYTES)])
    assert float(held[0].sum()) == 0
    assert float(cache.get(KEY)[0].sum()) == SMALL_BYTES


def test_numbers_beyond_half_precision_are_refused(tmp_path):
    cache = FeatureCache(tmp_path, "float16")
    cache.put(KEY, [torch.tensor([65504.0, -65504.0])])
    assert cache.get(KEY)[0].tolist() == [65504.0, -65504.0]
    with pytest.raises(UsageError, match=r"reach 70000; half precision holds up to 65504.*float32"):
        cache.put(OTHER, [torch.ones(3), torch.tensor([1.0, -70000.0])])
    assert cache.get(OTHER) is None
    FeatureCache(tmp_path).put(OTHER, [torch.tensor([70000.0])])


def test_a_folder_that_cannot_be_written(tensors, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"file: features cannot be cached there .*--cache"):
        FeatureCache(tmp_path / "file").put(KEY, tensors)
    assert FeatureCache(tmp_path / "file").get(KEY) is None


def test_a_failed_write_leaves_nothing(tensors, tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path)
    cache.put(KEY, tensors)

    def full(named, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"{FeatureCache.__module__}.save_file", full)
    with pytest.raises(UsageError, match="No space left"):
        cache.put(KEY, [t + 1 for t in tensors])
    assert equal(cache.get(KEY), tensors)
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("key", ["", "../../etc/passwd", KEY.upper(), KEY + "\n", KEY[:-1]])
def test_what_is_no_key_is_refused(tmp_path, key):
    with pytest.raises(UsageError, match="64 hex digits"):
        FeatureCache(tmp_path).get(key)


def test_an_entry_holds_something(tmp_path):
    with pytest.raises(ShapeError, match="at least one"):
        FeatureCache(tmp_path).put(KEY, [])


def write_and_read(folder: Path, value: float, rounds: int, reports) -> None:
    """Put the same key over and over and report every set of numbers that was read.

    A read that the other process overtakes each time is a miss, which is no fault: what must not
    be is an entry of two halves.
    """
    torch.set_num_threads(1)
    cache = FeatureCache(folder)
    read = []
    for _ in range(rounds):
        cache.put(KEY, [torch.full((SMALL_BYTES,), value), torch.full((7,), value)])
        found = cache.get(KEY) or ()
        read.append({float(x) for t in found for x in (t.min(), t.max())})
    reports.put(read)


def test_two_processes_may_write_one_key(tmp_path):
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    workers = [
        context.Process(target=write_and_read, args=(tmp_path, value, 60, reports))
        for value in (1.0, 2.0)
    ]
    for worker in workers:
        worker.start()
    read = [numbers for _ in workers for numbers in reports.get(timeout=120)]
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    assert all(len(numbers) <= 1 for numbers in read)
    assert any(read)
    assert FeatureCache(tmp_path).get(KEY) is not None
    assert not list(tmp_path.rglob("*.part"))
