"""The times of a run's loop: spent training, and since the last row and the last checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Times of a run's loop in seconds; `before` were spent in earlier parts of the run."""

    def __init__(self, before: float, steps_done: int) -> None:
        self._began = self._logged = self._saved = time.perf_counter()
        self._before, self._logged_step, self._first_step = before, steps_done, steps_done

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Time that is not the training's."""
        stopped = time.perf_counter()
        yield
        self._began += time.perf_counter() - stopped

    def seconds(self) -> float:
        """Spent training, earlier parts included."""
        return self._before + time.perf_counter() - self._began

    def seconds_per_step(self, steps_done: int) -> float:
        """Mean over this part of the run."""
        return (time.perf_counter() - self._began) / max(1, steps_done - self._first_step)

    def since_log(self) -> float:
        """Since the last row."""
        return time.perf_counter() - self._logged

    def since_save(self) -> float:
        """Since the last checkpoint."""
        return time.perf_counter() - self._saved

    def images_per_second(self, steps_done: int, batch_size: int) -> float:
        """Since the last row."""
        return (steps_done - self._logged_step) * batch_size / max(1e-9, self.since_log())

    def logged(self, steps_done: int) -> None:
        """A row was written."""
        self._logged, self._logged_step = time.perf_counter(), steps_done

    def saved(self) -> None:
        """A checkpoint was written."""
        self._saved = time.perf_counter()
