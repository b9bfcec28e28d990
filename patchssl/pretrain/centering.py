"""Centering: what keeps a teacher's targets from collapsing. Running means of its logits, or Sinkhorn's balancing.

In formulas first: `teacher_probs` = softmax(`centered`), with a center that moves as `ema_center` says (DINO), or
`sinkhorn` in their place (SwAV). Then what training keeps: `EmaCenter`, one such center, and `Centers`, those of class
and of patch tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from patchssl.pretrain.config import Recipe
from patchssl.pretrain.head import Prototypes
from patchssl.pretrain.network import Network
from patchssl.runtime.distributed import all_reduce_max, all_reduce_mean, all_reduce_sum


def teacher_probs(logits: Tensor, center: Tensor, temp: float) -> Tensor:
    """The teacher's probabilities (..., K), softmax((t - center) / temp): DINO, arXiv 2104.14294, algorithm 1.

    Taking the center off keeps one prototype from winning always, a low temperature keeps all from being alike.
    """
    return centered(logits, center, temp).softmax(dim=-1)


def centered(logits: Tensor, center: Tensor, temp: float, *, divided: bool = False) -> Tensor:
    """(t - center) / temp of `logits` t (..., K), and `center` (K,), (1, K) or one of each row, in float32 at least.

    Logits that are `divided` by `temp` already (in the bottleneck, which is narrower) are changed in place.
    """
    return logits.sub_(center, alpha=1 / temp) if divided else (logits - center) / temp


def ema_center(center: Tensor, logits: Tensor, momentum: float) -> Tensor:
    """The next center (K,): m center + (1 - m) mean of the teacher's `logits` (T, K); DINO, equation 4.

    `EmaCenter.update` gets there without these logits.
    """
    return momentum * center + (1 - momentum) * logits.mean(0)


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Probabilities (T, K) whose prototypes are used equally often (SwAV, arXiv 2006.09882; DINOv2's constants).

    Q = exp(t / temp), then in turn columns (prototypes) are divided by their sums and rows (tokens) by theirs, which
    end as 1. Rows are tokens of all processes together, of which one may have none.
    """
    scaled = logits.float() / temperature
    highest = scaled.max() if scaled.numel() else scaled.new_tensor(-torch.inf)
    q = torch.exp(scaled - all_reduce_max(highest))
    for _ in range(iterations):
        q = q / all_reduce_sum(q.sum(0, keepdim=True)).clamp(min=1e-30)
        q = q / q.sum(1, keepdim=True).clamp(min=1e-30)
    return q


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


class Centers(nn.Module):
    """EMA centers of class and patch tokens; DINO, which compares no patch tokens, has none for them."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        patches = (recipe.views.global_size // recipe.model.patch_size) ** 2
        positions = patches if recipe.loss.center_per_position else 1
        size, momentum = recipe.head.num_prototypes, recipe.loss.center_momentum
        self.moves = recipe.loss.centering == "ema"
        self.class_token = EmaCenter(size, momentum)
        self.patch_tokens = None if recipe.method == "dino" else EmaCenter(size, momentum, positions)

    def update(self, teacher: Network, class_means: Sequence[Tensor], patch_means: Sequence[Tensor]) -> None:
        """Move towards the mean logits of all teacher tokens of an update.

        It came in equal parts: of each the mean bottleneck of its class tokens (1, d), and that of its patch tokens,
        (1, d) or (positions, d).
        """
        if not self.moves:
            return
        self.class_token.update(teacher.head.last_layer, torch.stack(list(class_means)).mean(0))
        if self.patch_tokens is not None:
            self.patch_tokens.update(teacher.head.patch_layer, torch.stack(list(patch_means)).mean(0))

    def norms(self) -> tuple[Tensor, ...]:
        """Lengths of the centers (of the mean over positions): what the teacher would say of nothing."""
        kinds = [center.value for center in (self.class_token, self.patch_tokens) if center is not None]
        return tuple(value.mean(0).norm() for value in kinds)
