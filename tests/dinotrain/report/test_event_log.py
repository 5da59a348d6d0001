"""The log for TensorBoard, read by a parser of its own: nothing lost, nothing doubled."""

import math
import struct
from pathlib import Path

import pytest

from dinotrain.errors import UsageError
from dinotrain.report.event_log import EventLog


def crc32c(data: bytes) -> int:
    """Castagnoli's checksum, bit by bit, masked as the format asks."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def records(data: bytes):
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        body = data[12 : 12 + length]
        assert struct.unpack("<I", data[8:12])[0] == crc32c(data[:8])
        assert struct.unpack("<I", data[12 + length : 16 + length])[0] == crc32c(body)
        yield body
        data = data[16 + length :]


def fields(message: bytes) -> dict[int, list]:
    """Fields of one protobuf message by number: varints, doubles, floats and byte strings."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            value |= (message[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if message[at - 1] < 128:
                return value, at

    found: dict[int, list] = {}
    place = 0
    while place < len(message):
        key, place = varint(place)
        kind = key & 7
        if kind == 0:
            value, place = varint(place)
        elif kind == 2:
            length, place = varint(place)
            value, place = message[place : place + length], place + length
        else:
            code, size = ("<d", 8) if kind == 1 else ("<f", 4)
            (value,) = struct.unpack(code, message[place : place + size])
            place += size
        found.setdefault(key >> 3, []).append(value)
    return found


def read(folder: Path) -> list[tuple[int, str, float]]:
    """(step, name, value) of every scalar in a folder, in the order of reading."""
    rows = []
    for path in sorted(folder.glob("*tfevents*")):
        events = [fields(body) for body in records(path.read_bytes())]
        assert events[0][3] == [b"brain.Event:2"]
        for event in events:
            for summary in event.get(5, []):
                for value in fields(summary).get(1, []):
                    entry = fields(value)
                    name, number = entry[1][0].decode(), entry.get(2, [0.0])[0]
                    rows.append((event.get(2, [0])[0], name, number))
    return rows


def test_the_checksum_is_castagnoli_s():
    # The check value of the catalogue of CRCs for "123456789" is e3069283.
    assert crc32c(b"123456789") == (((0xE3069283 >> 15) | (0xE3069283 << 17)) + 0xA282EAD8) % 2**32


def test_scalars_are_on_disk_before_the_log_is_closed(tmp_path):
    log = EventLog(tmp_path / "run")
    log.scalars(0, {"loss": 1.5, "val/mae_mm": None})
    log.scalars(1, {"loss": math.nan, "lr": 0})
    rows = read(tmp_path / "run")
    assert rows[0] == (0, "loss", 1.5)
    assert rows[1][:2] == (1, "loss") and math.isnan(rows[1][2])
    assert rows[2:] == [(1, "lr", 0.0)]
    log.close()
    log.close()
    assert len(read(tmp_path / "run")) == 3


def test_a_resumed_run_doubles_no_step(tmp_path):
    killed = EventLog(tmp_path)
    for step in range(1, 7):
        killed.scalars(step, {"loss": step, "val": 10 * step})
    with EventLog(tmp_path, first_step=4) as log:
        for step in range(4, 9):
            log.scalars(step, {"loss": 100 + step})
    rows = read(tmp_path)
    assert [row for row in rows if row[1] == "loss"] == [
        (step, "loss", float(step if step < 4 else 100 + step)) for step in range(1, 9)
    ]
    # Names that the resumed run does not write are cut as well.
    assert [row[0] for row in rows if row[1] == "val"] == [1, 2, 3]
    killed.close()


def test_the_reader_sees_doubled_steps(tmp_path):
    with EventLog(tmp_path) as first:
        first.scalars(1, {"loss": 1})
        # A fault planted: the earlier log is hidden from the second one.
        path = next(tmp_path.iterdir())
        hidden = path.rename(path.with_name("hidden"))
        EventLog(tmp_path, first_step=1).scalars(1, {"loss": 2})
        hidden.rename(path)
    assert [row[0] for row in read(tmp_path)] == [1, 1]


def test_a_new_run_replaces_the_old_one(tmp_path):
    EventLog(tmp_path).scalars(5, {"old": 1})
    EventLog(tmp_path).scalars(1, {"new": 2})
    assert read(tmp_path) == [(1, "new", 2.0)]


def test_a_session_starts_where_the_run_goes_on(tmp_path):
    EventLog(tmp_path, first_step=7).close()
    events = [fields(body) for body in records(next(tmp_path.iterdir()).read_bytes())]
    # SessionLog is field 7 of an event; its status 1 is START.
    assert (events[1][2], fields(events[1][7][0])[1]) == ([7], [1])


@pytest.mark.parametrize("cut", [1, 9, 30])
def test_a_log_cut_by_a_kill_is_read_up_to_there(tmp_path, cut):
    EventLog(tmp_path).scalars(1, {"loss": 1})
    path = next(tmp_path.iterdir())
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(whole[-cut:])
    with EventLog(tmp_path, first_step=2) as log:
        log.scalars(2, {"loss": 2})
    assert read(tmp_path) == [(1, "loss", 1.0), (2, "loss", 2.0)]


def test_a_rewrite_killed_before_its_end_is_done_again(tmp_path):
    EventLog(tmp_path).scalars(1, {"loss": 1})
    old = next(tmp_path.iterdir())
    copy = old.read_bytes()
    EventLog(tmp_path, first_step=2).close()
    # As if it had been killed between writing the new log and removing the old one.
    old.write_bytes(copy)
    (tmp_path / ".events.out.tfevents.1.dinotrain.part").write_bytes(b"half")
    with EventLog(tmp_path, first_step=2) as log:
        log.scalars(2, {"loss": 2})
    assert read(tmp_path) == [(1, "loss", 1.0), (2, "loss", 2.0)]
    assert not list(tmp_path.glob(".*"))


def test_foreign_logs_are_left_alone(tmp_path):
    foreign = tmp_path / "events.out.tfevents.1700000000.host"
    foreign.write_bytes(b"not ours")
    EventLog(tmp_path).close()
    assert foreign.read_bytes() == b"not ours"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="the log cannot be written"):
        EventLog(tmp_path / "file")
