"""What the user sees while work goes on: a progress bar on a terminal, plain lines elsewhere.

Converters write to the process's own stdout and stderr, from C++ too; ``quiet`` sends that to a log
file and keeps the console on the real stderr.
"""

import ctypes
import logging
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Reporter:
    """Names each step with its time on stderr, which survives ``quiet``."""

    def __init__(self, enabled: bool = True) -> None:
        self._file = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace")
        # Asked of the file itself: variables such as FORCE_COLOR make rich draw bars into a file.
        self.console = Console(file=self._file, force_terminal=self._file.isatty())
        self._enabled = enabled
        self._draws = enabled and self.console.is_terminal and not self.console.is_dumb_terminal

    @contextmanager
    def step(self, text: str) -> Iterator["Step"]:
        """Show one step while it runs and its time when it is done."""
        start = time.monotonic()
        if self._draws:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
            )
            with self._progress(columns, transient=True) as progress:
                yield Step(progress, progress.add_task(text, total=None))
        else:
            yield Step(None, TaskID(0))
        self.say(f"{text}  {time.monotonic() - start:.1f} s")

    @contextmanager
    def tracker(self) -> Iterator[Callable[..., None]]:
        """Give a function (stage, done, total, note) that shows how far each stage is.

        With a total of 0 the note is a remark, on a line of its own.
        """
        if not self._draws:
            shown: dict[str, int] = {}

            def plain(stage: str, done: int, total: int, note: str = "") -> None:
                if not total:
                    self.say(note)
                    return
                tenth = 10 * done // max(total, 1)
                if tenth != shown.get(stage):
                    shown[stage] = tenth
                    self.say(f"{stage} {done}/{total}  {note}".rstrip())

            yield plain
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with self._progress(columns, transient=False) as progress:
            bars: dict[str, TaskID] = {}

            def draw(stage: str, done: int, total: int, note: str = "") -> None:
                if not total:
                    self.say(note)
                    return
                if stage not in bars:
                    bars[stage] = progress.add_task(stage, total=total, note="")
                progress.update(bars[stage], completed=done, total=total, note=note)

            yield draw

    def _progress(self, columns: tuple[ProgressColumn, ...], transient: bool) -> Progress:
        # By default rich takes sys.stdout over while it draws, and prints what libraries write
        # there above the bar: past ``quiet``, onto the terminal.
        return Progress(
            *columns,
            console=self.console,
            transient=transient,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def say(self, text: str) -> None:
        """Write one line."""
        if self._enabled:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class Step:
    """A running step; ``update`` moves its bar."""

    def __init__(self, progress: Progress | None, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def update(self, done: int, total: int) -> None:
        """Show ``done`` of ``total``."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done, total=total)


@contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Send everything that libraries print, log or warn to the end of a log file."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    handlers = list(logging.getLogger().handlers)
    try:
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        _flush_c()
        for stream, descriptor in zip(saved, (1, 2), strict=True):
            os.dup2(stream, descriptor)
            os.close(stream)
        os.close(handle)
        # Libraries attach handlers to the root logger, which would speak from now on.
        logging.getLogger().handlers[:] = handlers


@contextmanager
def quiet_beside(out: Path) -> Iterator[None]:
    """``quiet`` into ``out``'s name with the suffix .log, if there is anything to write."""
    with tempfile.TemporaryDirectory(prefix="dinoexport-") as folder:
        noise = Path(folder) / "log"
        try:
            with quiet(noise):
                yield
        finally:
            if noise.stat().st_size and out.parent.is_dir():
                shutil.copyfile(noise, out.with_suffix(".log"))


def _flush_c() -> None:
    """Write out what C code printed: its buffer would reach the real stdout at the end."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).fflush(None)
