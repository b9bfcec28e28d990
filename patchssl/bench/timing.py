"""Contenders timed side by side on one thread, what memory they take, and the machine that they ran on."""

from __future__ import annotations

import platform
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TURN_SECONDS = 0.02  # what is shorter is called several times a turn


class Candidate(NamedTuple):
    """Something to be timed: called with a number that varies its draws, works on `units` items a call."""

    run: Callable[[int], object]
    units: int = 1


def median_times(candidates: Mapping[str, Candidate], repeats: int) -> dict[str, float]:
    """Processor seconds per item of each candidate on one thread: median over `repeats` turns.

    Equal to wall-clock seconds on an idle machine, and much the same on a busy one. Short ones are called
    several times a turn, so that what ran before them is not what is measured.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    with one_thread():
        for candidate in candidates.values():
            _processor_seconds(candidate, 0, calls=1)  # first calls pay for set-up
        calls = {name: 1 + int(TURN_SECONDS / _processor_seconds(candidate, 0, calls=1))
                 for name, candidate in candidates.items()}
        for turn in range(repeats):
            for name, candidate in candidates.items():
                times[name].append(_processor_seconds(candidate, turn, calls[name]) / candidate.units)
    return {name: float(np.median(values)) for name, values in times.items()}


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside and still there: `peak` is their most."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._holders: Counter[int] = Counter()  # tensors by the address of their memory

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given - self._holders.keys():
                self._hold(tensor)
        return found

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if not self._holders[address]:
            self._live += size
            self.peak = max(self.peak, self._live)
        self._holders[address] += 1
        weakref.finalize(tensor, self._release, address, size)

    def _release(self, address: int, size: int) -> None:
        self._holders[address] -= 1
        if not self._holders[address]:
            del self._holders[address]
            self._live -= size


def tensor_memory(run: Callable[[], object]) -> float:
    """MiB of the tensors that `run` makes, at their most, those it returns included."""
    with LiveTensors() as live:
        kept = run()
    del kept
    return live.peak / 2**20


def _processor_seconds(candidate: Candidate, turn: int, calls: int) -> float:
    """Processor seconds of one call, the mean of `calls`, each with a number of its own."""
    began = time.process_time()
    for call in range(calls):
        candidate.run(turn * calls + call)
    return max(1e-9, time.process_time() - began) / calls


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch works on one thread inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, threads, versions."""
    model = platform.processor() or platform.machine()
    with suppress(OSError, IndexError):
        model = Path("/proc/cpuinfo").read_text().split("model name")[1].split("\n")[0].strip("\t :")
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("torchvision", "numpy", "pillow", "lightly"):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {"processor": model, "instructions": torch.backends.cpu.get_cpu_capability(), "threads": 1,
            "versions": versions}
