"""The one file that names torch.distributed: everything here is a no-op when there is one process."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


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
    if not is_active():
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of `x` over all processes; `x` itself when there is only one."""
    if not is_active():
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total
