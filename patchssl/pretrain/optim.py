"""AdamW with DINO's parameter groups, and clipping per parameter tensor."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from patchssl.pretrain.schedules import StepValues
from patchssl.runtime.distributed import own_shards, whole_norms


def make_optimizer(student: nn.Module, device: torch.device) -> torch.optim.AdamW:
    """AdamW over the trainable weights; weight decay only where a tensor has two dimensions or more."""
    trainable = [p for p in student.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trainable if p.ndim > 1], "decays": True},
              {"params": [p for p in trainable if p.ndim <= 1], "decays": False, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, fused=True if device.type in ("cuda", "cpu") else None)


def set_step_values(optimizer: torch.optim.Optimizer, values: StepValues) -> None:
    """Learning rate for all groups, weight decay for the one that decays."""
    for group in optimizer.param_groups:
        group["lr"] = values.lr
        group["weight_decay"] = values.weight_decay if group["decays"] else 0.0


@torch.no_grad()
def clip_per_parameter(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale each gradient to a norm of at most `max_norm` by itself, as DINO does; 0 only measures.

    Returns the global gradient norm before clipping, a scalar.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norms = whole_norms(grads)
    if max_norm:
        factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(own_shards(grads), list(factors.unbind()))
    return norms.norm()
