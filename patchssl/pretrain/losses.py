"""What student and teacher must agree on, in its plain form: cross-entropy of class tokens and of matched patches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from patchssl.pretrain.pairs import MatchPlan


def class_loss(student_logits: Tensor, teacher_probs: Tensor, weight: Tensor, student_temp: float) -> Tensor:
    """Weighted cross-entropy between class tokens of all pairs of views (DINO, arXiv 2104.14294, eq. 3).

    `student_logits` (B, V, K), `teacher_probs` (B, G, K) without gradient, `weight` (B, G, V).
    """
    log_probs = F.log_softmax(student_logits.float() / student_temp, dim=-1)
    target = torch.einsum("bgv,bgk->bvk", weight, teacher_probs)  # cross-entropy is linear in its target
    return -(target * log_probs).sum()


def patch_loss(student_logits: Tensor, teacher_probs: Tensor, plan: MatchPlan, student_temp: float) -> Tensor:
    """Weighted cross-entropy over matched patch tokens.

    `student_logits` (S, K) of `plan.student_tokens`, `teacher_probs` (T, K) of `plan.teacher_tokens`. A batch whose
    views share nothing gives a zero that still has a gradient. The step itself uses `matched_cross_entropy`, which
    gives the same without holding these matrices.
    """
    log_probs = F.log_softmax(student_logits.float() / student_temp, dim=-1)
    target = torch.zeros_like(log_probs)
    for student, teacher, weight in _chunks(plan):
        target.index_add_(0, student, weight[:, None] * teacher_probs[teacher])
    return -(target * log_probs).sum() / plan.num_pairs.clamp(min=1e-6)


def _chunks(plan: MatchPlan, size: int = 4096) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The matches a few thousand at a time, so that no (matches x prototypes) matrix is held."""
    return zip(plan.student.split(size), plan.teacher.split(size), plan.weight.split(size), strict=True)
