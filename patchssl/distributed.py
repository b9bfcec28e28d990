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
    return all_reduce_sum(x) / world_size() if is_active() else x


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of `x` over all processes; `x` itself when there is only one."""
    return _all_reduce(x, dist.ReduceOp.SUM) if is_active() else x


def all_reduce_max(x: Tensor) -> Tensor:
    """Largest `x` of all processes, entry by entry; `x` itself when there is only one."""
    return _all_reduce(x, dist.ReduceOp.MAX) if is_active() else x


def _all_reduce(x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    total = x.clone()
    dist.all_reduce(total, operation)
    return total
