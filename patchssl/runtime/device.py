"""The device a network runs on: which it is, what it is called in a record, and the most memory it took so far.

`training_device` gives each launched process its own GPU; `default_device` is for all else, and refuses a device that
is not there.
"""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

from patchssl.runtime.distributed import local_rank
from patchssl.runtime.errors import UsageError


def training_device(device: str | None) -> torch.device:
    """`device`, or a GPU (each launched process its own), or the CPU."""
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return torch.device("cuda", local_rank()) if chosen.type == "cuda" and chosen.index is None else chosen


def peak_memory(device: torch.device) -> int:
    """Peak memory so far in bytes: of torch's tensors on a GPU, else of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with suppress(OSError, LookupError, ValueError):  # Linux; getrusage's includes that of who started it
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe_device(device: torch.device) -> str:
    """Where and how a network ran, for the record: what may move the last digit of a number."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, bfloat16 autocast"
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' * (threads != 1)}"


def default_device(device: str | None) -> torch.device:
    """`device`, or the first GPU, or the CPU; UsageError for a device that is not there."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device} cannot be used ({str(error).splitlines()[0]}); 'patchssl doctor' lists "
                         "what is there") from None
    return chosen
