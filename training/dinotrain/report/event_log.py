"""Scalars of a run for TensorBoard, written so that a killed run loses and doubles nothing.

tensorboardX writes the records: under a megabyte on top of protobuf, which is here anyway, against
60 MB for TensorBoard itself, which torch.utils.tensorboard needs. Its ``SummaryWriter`` is passed
over: it hands events to a thread that a kill takes along, and names files by the second, so that a
run resumed at once would overwrite its own log.
"""

import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dinotrain.errors import UsageError

_SUFFIX = ".dinotrain"
"""Ends the names of our files: no others are touched."""


class EventLog:
    """The log of one run in a folder; what ``scalars`` returns from is on disk.

    Scalars that an earlier log of ours holds at ``first_step`` or later are removed: a resumed run
    names the step that it goes on with, a new one replaces all. TensorBoard's own mark for this,
    the start of a session, is written too, for one that is watching; alone it would not do, because
    the reader that TensorBoard 2.21 starts by default passes over it.

    Args:
        folder: made where it is missing; TensorBoard's ``--logdir`` is it or above it.
        first_step: the smallest step that will be written.

    Raises:
        UsageError: the folder cannot be written.
    """

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _drop_from(folder, first_step)
            self._writer = _start(_new_path(folder), first_step)
        except OSError as error:
            raise UsageError(
                f"{folder}: the log cannot be written ({error.strerror or error}). "
                "Give another folder."
            ) from error

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write named values of one step; None is left out, NaN is shown as such.

        Each call waits for the disk, so call it per epoch or every some batches.
        """
        known = {name: float(value) for name, value in values.items() if value is not None}
        if known:
            _write(self._writer, time.time(), step, known)
            self._writer.flush()

    def close(self) -> None:
        """Close the file; calling it twice does no harm."""
        self._writer.close()

    def __enter__(self) -> "EventLog":
        """Return the log."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()


def _new_path(folder: Path) -> Path:
    # TensorBoard reads files in the order of their names, and needs "tfevents" in them.
    return folder / f"events.out.tfevents.{time.time_ns()}{_SUFFIX}"


def _drop_from(folder: Path, first_step: int) -> None:
    """Rewrite our logs as one that ends before ``first_step``; killed half-way it can be redone."""
    old = sorted(folder.glob(f"events.out.tfevents.*{_SUFFIX}"))
    if not old:
        return
    # A log that was rewritten by a run killed before it removed the old ones stands there twice.
    kept: dict[tuple[int, str], tuple[float, float]] = {}
    for path in old:
        for event in _events(path):
            for value in event.summary.value:
                if event.step < first_step:
                    kept[event.step, value.tag] = (event.wall_time, value.simple_value)
    if kept:
        path = _new_path(folder)
        partial = path.with_name(f".{path.name}.part")
        writer = _start(partial, 0)
        for (step, name), (when, value) in kept.items():
            _write(writer, when, step, {name: value})
        writer.flush()
        writer.close()
        partial.replace(path)
    for path in (*old, *folder.glob(f".events.out.tfevents.*{_SUFFIX}.part")):
        path.unlink(missing_ok=True)


def _events(path: Path) -> Iterator[Any]:
    """Events of a log, up to where a kill cut it."""
    from tensorboardX.proto.event_pb2 import Event  # type: ignore[attr-defined]
    from tensorboardX.record_writer import masked_crc32c

    data, place = path.read_bytes(), 0
    # A record: length, its checksum, the event, its checksum.
    while place + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        body = data[place + 12 : place + 12 + length]
        if data[place + 12 + length :][:4] != struct.pack("<I", masked_crc32c(body)):
            return
        yield Event.FromString(body)
        place += 16 + length


def _start(path: Path, first_step: int) -> Any:
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
    from tensorboardX.record_writer import RecordWriter

    writer, now = RecordWriter(str(path)), time.time()
    session = SessionLog(status=SessionLog.START)
    for event in (
        Event(wall_time=now, file_version="brain.Event:2"),
        Event(wall_time=now, step=first_step, session_log=session),
    ):
        writer.write(event.SerializeToString())
    writer.flush()
    return writer


def _write(writer: Any, when: float, step: int, values: Mapping[str, float]) -> None:
    from tensorboardX.proto.event_pb2 import Event  # type: ignore[attr-defined]
    from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[attr-defined]

    entries = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
    event = Event(wall_time=when, step=step, summary=Summary(value=entries))
    writer.write(event.SerializeToString())
