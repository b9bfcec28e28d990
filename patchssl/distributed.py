"""The one file that names torch.distributed: everything here is a no-op when there is one process."""

from __future__ import annotations

import atexit
import contextlib
import os
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def join_launched(device_type: str = "cpu") -> None:
    """Join the processes that torchrun started, by gloo, or nccl on GPUs; nothing to do without a launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and dist.is_available() and not dist.is_initialized():
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
        atexit.register(_leave)


def _leave() -> None:
    """End together: a process that goes while another still talks to it brings that one down."""
    with contextlib.suppress(RuntimeError):
        dist.barrier()
    dist.destroy_process_group()


def local_rank() -> int:
    """This process's number on its machine, which chooses its GPU; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_active() -> bool:
    """Whether a process group of several ranks is up."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, 0 alone."""
    return dist.get_rank() if is_active() else 0


def world_size() -> int:
    """How many processes work together, 1 alone."""
    return dist.get_world_size() if is_active() else 1


def all_reduce_mean(x: Tensor) -> Tensor:
    """Mean of `x` over all processes; `x` itself when there is only one.

    Losses and metrics call this and stay the same in a test and on eight GPUs.
    """
    return all_reduce_sum(x) / world_size() if is_active() else x


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of `x` over all processes; `x` itself when there is only one."""
    return _all_reduce(x, dist.ReduceOp.SUM) if is_active() else x


def all_reduce_max(x: Tensor) -> Tensor:
    """Largest `x` of all processes, entry by entry; `x` itself when there is only one."""
    return _all_reduce(x, dist.ReduceOp.MAX) if is_active() else x


def all_gather_objects(own: T) -> list[T]:
    """What every process hands in, in the order of their ranks; alone, a list of `own`."""
    if not is_active():
        return [own]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, own)
    return gathered


def _all_reduce(x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    total = x.clone()
    dist.all_reduce(total, operation)
    return total
