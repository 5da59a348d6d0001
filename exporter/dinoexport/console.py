"""What the user sees while work goes on: a progress bar on a terminal, plain lines elsewhere.

Converters write to the process's own stdout and stderr, from C++ too; ``quiet`` sends that to a log
file and keeps the console on the real stderr.
"""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
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
        self.console = Console(file=self._file)
        self._enabled = enabled
        self._progress: Progress | None = None

    @contextmanager
    def step(self, text: str) -> Iterator["Step"]:
        """Show one step while it runs and its time when it is done."""
        start = time.monotonic()
        if self._enabled and self.console.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
            )
            with Progress(*columns, console=self.console, transient=True) as progress:
                yield Step(progress, progress.add_task(text, total=None))
        else:
            yield Step(None, None)
        self.say(f"{text}  {time.monotonic() - start:.1f} s")

    @contextmanager
    def tracker(self) -> Iterator[Callable[..., None]]:
        """Give a function (stage, done, total, note) that shows how far each stage is."""
        if not (self._enabled and self.console.is_terminal):
            shown: dict[str, int] = {}

            def plain(stage: str, done: int, total: int, note: str = "") -> None:
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
        with Progress(*columns, console=self.console) as progress:
            bars: dict[str, TaskID] = {}

            def draw(stage: str, done: int, total: int, note: str = "") -> None:
                if stage not in bars:
                    bars[stage] = progress.add_task(stage, total=total, note="")
                progress.update(bars[stage], completed=done, total=total, note=note)

            yield draw

    def say(self, text: str) -> None:
        """Write one line."""
        if self._enabled:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class Step:
    """A running step; ``update`` moves its bar."""

    def __init__(self, progress: Progress | None, task) -> None:
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
    try:
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, descriptor in zip(saved, (1, 2), strict=True):
            os.dup2(stream, descriptor)
            os.close(stream)
        os.close(handle)
        # Libraries attach handlers to the root logger; ours stays silent.
        logging.getLogger().handlers.clear()
