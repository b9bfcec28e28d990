"""What a person sees while something runs: sentences and progress with time left, all on stderr."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from patchssl.runtime.errors import printable

LOOK = "looking at files"  # what is counted before an evaluation


class Console:
    """Sentences and one progress bar at a time; plain lines every few seconds where stderr is no terminal."""

    def __init__(self, *, quiet: bool = False, seconds_between_lines: float = 10.0) -> None:
        # of several processes that torchrun started one speaks
        quiet = quiet or os.environ.get("RANK", "0") != "0"
        self._rich = RichConsole(stderr=True, quiet=quiet, highlight=False)
        self._progress: Progress | None = None
        self._seconds_between_lines = seconds_between_lines
        self._began = self._last_line = time.monotonic()
        self._done = 0

    def __enter__(self) -> Console:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def say(self, sentence: str) -> None:
        """Print a sentence, above the bar if there is one."""
        with suppress(OSError):  # nobody reads any more (a pipe's end that was closed): no reason to end the work
            self._rich.print(printable(sentence), markup=False, soft_wrap=True)

    def update(self, done: int, total: int, row: dict[str, Any] | None = None, what: str = "training") -> None:
        """Show that `done` of `total` are done; `row` is a pretraining log row whose main numbers are shown."""
        note = " ".join(_numbers(row)) if row else ""
        with suppress(OSError):
            if self._rich.is_terminal:
                self._bar(done, total, what, note)
            else:
                self._line(done, total, what, note)
        if done >= total:
            self.close()

    def counter(self, what: str) -> Any:
        """A `progress(done, total)` callback that is labeled `what`."""
        return lambda done, total: self.update(done, total, what=what)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._progress:
            with suppress(OSError):
                self._progress.stop()
        self._progress = None
        self._done = 0

    def _bar(self, done: int, total: int, what: str, note: str) -> None:
        if self._progress is None:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                       TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
                       TextColumn("{task.fields[note]}"))
            self._progress = Progress(*columns, console=self._rich)
            self._progress.add_task(printable(what), total=total, completed=done, note=note)
            self._progress.start()
        task = self._progress.tasks[0]
        self._progress.update(task.id, completed=done, note=note or task.fields["note"])

    def _line(self, done: int, total: int, what: str, note: str) -> None:
        now = time.monotonic()
        if not self._done:
            self._began, self._done = now, max(1, done)
            return
        if done >= total or now - self._last_line >= self._seconds_between_lines:
            self._last_line = now
            rate = (done - self._done) / max(1e-9, now - self._began)
            left = f", {clock((total - done) / rate)} left" if rate > 0 and done < total else ""
            self.say(f"{what} {done} of {total}{left} {note}".rstrip())


def _numbers(row: dict[str, Any]) -> list[str]:
    shown = [f"loss {row['loss']:.3f}", f"{row['images_per_second']:.0f} images/s"]
    if "knn_top1" in row:
        shown.append(f"k-NN {row['knn_top1']:.1%} (on training images)")
    return shown


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any.

    >>> clock(62), clock(3723)
    ('1:02', '1:02:03')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
