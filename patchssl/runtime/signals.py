"""Signals that end a run: obeyed at once, but never in the middle of an update or while something is written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

# SIGUSR1 and SIGUSR2 are the warnings of Slurm and of submitit
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(BaseException):
    """A signal asked to stop; no Exception, so that nobody on the way takes it for a failure of their own."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 75 (try again later) for the others."""
        return 130 if self.number == signal.SIGINT else 75


class StopSignals:
    """While entered, the first of SIGNALS raises Stopped in the main thread: at once, or at the end of `held`.

    A second one of the kind acts as it always did; one of another kind is left at that. With `together` set nothing
    is raised: processes agree on when they stop, see `patchssl.pretrain.run.sync`. With `held` nothing is raised
    before `listen`, by whoever can answer.
    """

    def __init__(self, *, held: bool = False) -> None:
        self.together = False
        self.received: int | None = None
        self._held = held
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        try:
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        except ValueError:  # not the main thread: signals are somebody else's
            pass
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """From now on signals are obeyed at once, one that has come already first."""
        self._held = False
        self.obey()

    @contextmanager
    def held(self) -> Iterator[None]:
        """A stretch that is done whole: a signal that comes in it is obeyed at its end."""
        self.obey()
        self._held = True
        try:
            yield
        finally:
            self._held = False
        self.obey()

    def obey(self) -> None:
        """Raise Stopped if a signal has come, also one whose Stopped was swallowed on its way."""
        if self.received is not None and not self.together:
            raise Stopped(self.received)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        signal.signal(number, self._before[number])
        if self.received is None:
            self.received = number
            if not self._held:
                self.obey()


@contextmanager
def signals_kept_from_children() -> Iterator[None]:
    """Processes started inside never get one of SIGNALS, often sent to a whole group: the main process obeys them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def ignore_sigchld() -> Iterator[None]:
    """Processes that end are no news here: torch's handler raises wherever this one is, in a `__del__` as well."""
    if threading.current_thread() is not threading.main_thread():  # handlers run in the main one
        yield
        return
    while True:
        try:
            before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            break
        except RuntimeError:  # of a process that has ended already
            continue
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
