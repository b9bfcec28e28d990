"""Batches from worker processes that always arrive, or an error that says what to do: no wait without an end.

torch's workers hand a batch over by shared memory, one open file per tensor. Where either is short (a container has
64 MB of /dev/shm unless it is told otherwise) a batch is lost in a thread of the worker, and its reader waits for
ever. Here a worker asks for both before it hands the batch over, and sends it through a pipe where it gets neither.
"""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from patchssl.runtime.errors import PatchSSLError, causes

_TICK = 60  # seconds after which a wait is said
_PATIENCE = 10  # ticks after which it ends
_OTHER_FILES = 200  # that a process may have open beside those of batches
_WANTED_FILES = 65536  # open at a time, where the system lets a process raise its limit
_TIMED_OUT = "DataLoader timed out after"
_NO_ROOM = "{}; docker run --shm-size=8g or --ipc=host gives more shared memory"

log = logging.getLogger(__name__)


class BatchLoader(Iterable[Any]):
    """torch's DataLoader over lists of keys `batches`; what `collate` makes of their items arrives in their order.

    `workers` processes read, or this one with 0. With `pin_memory` batches lie in page-locked memory, unless they came
    through a pipe. `generator` is drawn from once an iteration. PatchSSLError for a batch that does not come within
    ten minutes, though its worker lives.
    """

    def __init__(self, dataset: Dataset[Any], batches: Iterable[Sequence[Any]], collate: Callable[[list[Any]], Any], *,
                 workers: int, pin_memory: bool, generator: torch.Generator | None = None, prefetch: int = 2,
                 worker_init: Callable[[int], None] | None = None) -> None:
        # its own generator: every iterator draws from one, and what runs beside this must not notice
        common: dict[str, Any] = {"batch_sampler": batches, "pin_memory": pin_memory,
                                  "generator": generator or torch.Generator()}
        self._alone: DataLoader[Any] = DataLoader(dataset, collate_fn=collate, **common)
        self._workers = workers
        self._shared: DataLoader[Any] | None = None if not workers else DataLoader(
            dataset, collate_fn=_Sender(collate, workers * prefetch + 2), num_workers=workers, prefetch_factor=prefetch,
            worker_init_fn=worker_init, timeout=_TICK, **common)

    def __iter__(self) -> Iterator[Any]:
        if self._shared is None or not _can_have_workers():
            return iter(self._alone)
        _raise_file_limit()
        return self._received(iter(self._shared))  # workers start here, not with the first batch

    def _received(self, batches: Iterator[Any]) -> Iterator[Any]:
        told = False
        while (batch := self._next(batches)) is not None:
            if isinstance(batch, _Packed):
                if not told:
                    log.warning("batches come through pipes, which is slower: worker processes cannot share them (%s)",
                                batch.reason)
                told, batch = True, pickle.loads(batch.content)
            yield batch

    def _next(self, batches: Iterator[Any]) -> Any:
        """The next batch, None after the last."""
        began = time.monotonic()
        for tick in range(1, _PATIENCE + 1):  # a process that was stopped and goes on has missed one tick, not all
            try:
                return next(batches, None)
            except PatchSSLError as error:  # with a traceback for its message, where it comes from a worker
                _, _, said = str(error).rpartition(f"\n{type(error).__module__}.{type(error).__qualname__}: ")
                if not said:
                    raise
                raise type(error)(said.strip()) from None
            except RuntimeError as error:
                if not str(error).startswith(_TIMED_OUT):
                    raise
            if tick < _PATIENCE:
                log.warning("no batch has come for %d s from the %d worker processes; waiting on, %d s at most",
                            time.monotonic() - began, self._workers, _TICK * (_PATIENCE - tick))
        raise PatchSSLError(f"no batch has come for {time.monotonic() - began:.0f} s from the "
                            f"{self._workers} worker processes that read images, though they live: a disk "
                            "may hang, or a batch was lost; try again with 0 workers, which read in this process")


def lost_worker(error: BaseException | None) -> BaseException | None:
    """What of `error` and its causes says that a worker process is gone: torch's word breaks in anywhere."""
    for cause in causes(error):
        cut_off = isinstance(cause, ConnectionError | EOFError) and "in DataLoader worker" not in str(cause)
        if cut_off or "DataLoader worker (pid" in str(cause):
            return cause
    return None


def _can_have_workers() -> bool:
    """Whether this system gives processes what they talk through; the log says what it means that it does not."""
    try:
        multiprocessing.Semaphore()
        return True
    except OSError as error:
        log.warning("images are read in this process, which is slower: worker processes need a /dev/shm that can be "
                    "written (%s)", error.strerror)
        return False


class _Packed(NamedTuple):
    """A batch as bytes, and why its tensors could not be shared."""

    content: bytes
    reason: str


@dataclasses.dataclass(frozen=True)
class _Sender:
    """`collate` in a worker, its batch ready to be handed over; `under_way` batches may be at a time."""

    collate: Callable[[list[Any]], Any]
    under_way: int

    def __call__(self, items: list[Any]) -> Any:
        batch = self.collate(items)
        return batch if get_worker_info() is None else _shared(batch, self.under_way)


def _shared(batch: Any, under_way: int) -> Any:
    """`batch` with its tensors in shared memory, or packed where that is not to be had."""
    tensors = list(_tensors(batch))
    try:
        _require_files(len(tensors) * under_way)
        for tensor in tensors:
            tensor.share_memory_()
        return batch
    except OSError as error:
        reason = str(error)
    except RuntimeError as error:
        reason = _NO_ROOM.format(str(error).partition("\n")[0])
    return _Packed(pickle.dumps(batch, protocol=pickle.HIGHEST_PROTOCOL), reason)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested sequences, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(value):
        yield from _tensors([getattr(value, field.name) for field in dataclasses.fields(value)])


def _require_files(count: int) -> None:
    """OSError where a process cannot have so many files open beside its others."""
    if os.name == "posix":
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limit != resource.RLIM_INFINITY and count + _OTHER_FILES > limit:
            raise OSError(f"{count} tensors under way need as many open files, and a process may open {limit}: see "
                          "ulimit -n")


def _raise_file_limit() -> None:
    """As many open files as the system lets this process have, for its workers too."""
    if os.name == "posix":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, _WANTED_FILES)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
