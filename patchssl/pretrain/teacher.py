"""The teacher: an EMA copy of the student, and centering that keeps its targets from collapsing."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from patchssl.distributed import all_reduce_max, all_reduce_mean, all_reduce_sum
from patchssl.pretrain.head import Prototypes

M = TypeVar("M", bound=nn.Module)


def make_teacher(student: M) -> M:
    """A copy of `student` without gradients and without drop path."""
    return copy.deepcopy(student).requires_grad_(False).eval()


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, every weight."""
    ours, theirs = ([p.detach() for p in network.parameters()] for network in (teacher, student))
    torch._foreach_mul_(ours, momentum)
    torch._foreach_add_(ours, theirs, alpha=1 - momentum)


class EmaCenter(nn.Module):
    """Moving mean of the teacher's logits, kept in logits; (1, K), or (positions, K) with one per position."""

    value: Tensor

    def __init__(self, num_prototypes: int, momentum: float, positions: int = 1) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(positions, num_prototypes))

    @torch.no_grad()
    def update(self, prototypes: Prototypes, mean: Tensor) -> None:
        """Move towards the mean logits, given this process's `mean` bottleneck (1, d), or (positions, d).

        Logits are linear in the bottleneck, so their mean is the prototypes' answer to the mean vector: tokens
        whose logits nobody needs are never projected.
        """
        self.value.lerp_(prototypes(all_reduce_mean(mean)).to(self.value.dtype), 1 - self.momentum)


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Probabilities (T, K) whose prototypes are used equally often (SwAV, arXiv 2006.09882; DINOv2's constants).

    Rows are tokens of all processes together, of which one may have none; each row of the result sums to 1.
    """
    scaled = logits.float() / temperature
    highest = scaled.max() if scaled.numel() else scaled.new_tensor(-torch.inf)
    q = torch.exp(scaled - all_reduce_max(highest))
    for _ in range(iterations):
        q = q / all_reduce_sum(q.sum(0, keepdim=True)).clamp(min=1e-30)
        q = q / q.sum(1, keepdim=True).clamp(min=1e-30)
    return q
