"""Scalars of a run for TensorBoard, written so that a killed run loses and doubles nothing.

tensorboardX writes the records: half a megabyte on top of protobuf, which is here anyway, against
60 MB for TensorBoard itself, which torch.utils.tensorboard needs. Its ``SummaryWriter`` is passed
over: it hands events to a thread that a kill takes along, and names files by the second, so that a
run resumed at once would overwrite its own log.
"""

import time
from collections.abc import Mapping
from pathlib import Path

from dinotrain.errors import UsageError


class EventLog:
    """The log of one run in a folder; what a call returns from is on disk.

    Earlier logs in the folder stay, but TensorBoard shows of them only steps before
    ``first_step``: a resumed run names the step that it goes on with, a new one supersedes all.

    Args:
        folder: made where it is missing; TensorBoard's ``--logdir`` is it or above it.
        first_step: the smallest step that this log will hold.

    Raises:
        UsageError: the folder cannot be written.
    """

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
        from tensorboardX.record_writer import RecordWriter

        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # TensorBoard reads files in the order of their names, and needs "tfevents" in them.
            path = folder / f"events.out.tfevents.{time.time_ns()}.dinotrain"
            self._writer = RecordWriter(str(path))
        except OSError as error:
            raise UsageError(
                f"{folder}: the log cannot be written ({error.strerror or error}). "
                "Give another folder."
            ) from error
        now = time.time()
        start = SessionLog(status=SessionLog.START)
        self._add(Event(wall_time=now, file_version="brain.Event:2"))
        self._add(Event(wall_time=now, step=first_step, session_log=start))
        self._writer.flush()

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write named values of one step; None is left out, NaN is shown as such."""
        from tensorboardX.proto.event_pb2 import Event  # type: ignore[attr-defined]
        from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[attr-defined]

        known = {name: float(value) for name, value in values.items() if value is not None}
        entries = [Summary.Value(tag=name, simple_value=value) for name, value in known.items()]
        if not entries:
            return
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=entries)))
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

    def _add(self, event: object) -> None:
        self._writer.write(event.SerializeToString())  # type: ignore[attr-defined]
