"""How far a long pass is, told to whoever asked for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

Progress = Callable[[int, int], None]  # how much is done, how much there is in all
Say = Callable[[str], None]  # gets sentences for the user
LogRows = Sequence[Mapping[str, Any]]  # of a run's log, oldest first


def shifted(progress: Progress, before: int, total: int) -> Progress:
    """`progress` of one part as progress of the whole."""
    return lambda done, _: progress(before + done, total)


class Steps:
    """Tells `progress` of one more thing done out of `total`."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def one(self) -> None:
        """One more is done."""
        self._done += 1
        if self._progress:
            self._progress(self._done, self._total)

    def rest(self) -> None:
        """All is done: there was less to do than it seemed."""
        if self._progress and self._done < self._total:
            self._progress(self._total, self._total)


class Reporter(Protocol):
    """What shows how far several passes are; the command line's console is one."""

    def counter(self, what: str) -> Progress:
        """What counts `what`."""

    def say(self, sentence: str) -> None:
        """A sentence for the user."""


class CountersOnly:
    """The counters of a reporter, without its sentences."""

    def __init__(self, reporter: Reporter) -> None:
        self.counter = reporter.counter

    def say(self, sentence: str) -> None:
        """Not passed on."""


class RunProgress(Protocol):
    """What a run tells while it works; the command line draws it, a test listens."""

    def update(self, done: int, total: int, row: dict[str, Any]) -> None:
        """`done` of `total` updates are made, `row` is the newest log row (empty at first)."""

    def say(self, sentence: str) -> None:
        """A sentence for the user: what was understood, what was saved, a warning."""


class Silent:
    """Progress that nobody watches."""

    def update(self, done: int, total: int, row: dict[str, Any]) -> None:
        """Ignored."""

    def say(self, sentence: str) -> None:
        """Ignored."""
