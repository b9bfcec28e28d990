"""What student and teacher must agree on: class tokens of different views, and patch tokens of the same place.

The formulas, pair by pair: `pair_losses` is H(teacher, student) of two views, `pwself_loss` the mean of these under
every weighting. The same of a whole batch at once, from a `MatchPlan`: `class_loss`, as training has it, and
`patch_loss`, in whose place training has `patchssl.pretrain.crossentropy`, which holds no such matrices. Tests hold
them all equal, their gradients too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from patchssl.pretrain.config import CLASS_SHARE, Weighting
from patchssl.pretrain.pairs import MatchPlan


def pair_losses(student_logits: Tensor, teacher_probs: Tensor, teacher_ids: Tensor, student_ids: Tensor,
                student_temp: float) -> tuple[Tensor, Tensor]:
    """H(p, s) = -sum_k p_k log softmax(s / student_temp)_k of two views of an image (DINO, arXiv 2104.14294, eq. 2).

    `student_logits` s (1 + N_s, K) and `teacher_probs` p (1 + N_t, K), class token first, are of different views.
    `teacher_ids` and `student_ids` (M,) are their matches (`patchssl.views.matching.match_patches`). Gives the class
    token's H () and that of every match (M,).
    """
    log_probs = F.log_softmax(student_logits / student_temp, dim=-1)
    class_token = -(teacher_probs[0] * log_probs[0]).sum()
    matches = -(teacher_probs[1 + teacher_ids] * log_probs[1 + student_ids]).sum(-1)
    return class_token, matches


def pwself_loss(pairs: Sequence[tuple[Tensor, Tensor]], weighting: Weighting, patch_weight: float = 1.0,
                class_share: float = CLASS_SHARE) -> Tensor:
    """PW-Self's loss (arXiv 2310.18651) from `pair_losses` of all images' (teacher view t, student view s), t != s.

    `paper`, as in the authors' code: the mean over pairs of the mean over the class token and its M matches.
    `lambda`: the mean over pairs of class_share H_class + (1 - class_share) times the mean over matches, and without
    matches of class_share H_class (alijavidani/dino at 1cb4878). `lambda-sum`: times the sum over matches (f35bf24; it
    sums over the n images of a GPU too: n times ours, so the same updates as ours with optim.clip_grad / n, up to
    AdamW's eps).
    `balanced`: L_class + patch_weight L_patch, where L_class is the mean over pairs, as DINO's, and L_patch the mean
    over pairs with any match of the mean over its matches.
    """
    if weighting == "paper":
        return torch.stack([torch.cat([class_token[None], matches]).mean() for class_token, matches in pairs]).mean()
    if weighting != "balanced":
        of_pair = [matches.sum() / (max(1, len(matches)) if weighting == "lambda" else 1) for _, matches in pairs]
        return torch.stack([class_share * class_token + (1 - class_share) * patches
                            for (class_token, _), patches in zip(pairs, of_pair, strict=True)]).mean()
    class_term = torch.stack([class_token for class_token, _ in pairs]).mean()
    of_pairs = [matches.mean() for _, matches in pairs if len(matches)]
    return class_term + patch_weight * torch.stack(of_pairs).mean() if of_pairs else class_term


def class_loss(student_logits: Tensor, teacher_probs: Tensor, weight: Tensor, student_temp: float) -> Tensor:
    """Weighted cross-entropy between class tokens of all pairs of views (DINO, eq. 3).

    `student_logits` (B, V, K), `teacher_probs` (B, G, K) without gradient, `weight` (B, G, V).
    """
    log_probs = F.log_softmax(student_logits.float() / student_temp, dim=-1)
    target = torch.einsum("bgv,bgk->bvk", weight, teacher_probs)  # cross-entropy is linear in its target
    return -(target * log_probs).sum()


def patch_loss(student_logits: Tensor, teacher_probs: Tensor, plan: MatchPlan, student_temp: float) -> Tensor:
    """Weighted cross-entropy over matched patch tokens.

    `student_logits` (S, K) of `plan.student_tokens`, `teacher_probs` (T, K) of `plan.teacher_tokens`. A batch whose
    views share nothing gives a zero that still has a gradient.
    """
    total = matched_loss(student_logits, teacher_probs, plan.student, plan.teacher, plan.weight, student_temp)
    return total / plan.num_pairs.clamp(min=1e-6)


def matched_loss(student_logits: Tensor, teacher_probs: Tensor, student: Tensor, teacher: Tensor, weight: Tensor,
                 student_temp: float) -> Tensor:
    """Sum over M matches of `weight` * H(row `teacher`, row `student`), each (M,)."""
    log_probs = F.log_softmax(student_logits.float() / student_temp, dim=-1)
    target = torch.zeros_like(log_probs)
    # a few thousand at a time, so that no (matches x prototypes) matrix is held
    for rows, matched, share in zip(*(x.split(4096) for x in (student, teacher, weight)), strict=True):
        target.index_add_(0, rows, share[:, None] * teacher_probs[matched])
    return -(target * log_probs).sum()
