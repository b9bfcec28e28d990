"""The forward pass of a method: views to losses. PW-Self, DINO and iBOT differ in recipe, plan and masks only.

The student sees all views, the teacher the global ones. Class tokens are compared between different views; patch
tokens where the plan matches them: across views in PW-Self, at masked places of one view in iBOT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from patchssl.pretrain.centering import Centers, EmaCenter, sinkhorn, teacher_probs
from patchssl.pretrain.config import LossConfig
from patchssl.pretrain.crossentropy import MatchStats, TeacherTokens, matched_cross_entropy
from patchssl.pretrain.droppath import set_drop_path_draws
from patchssl.pretrain.losses import class_loss
from patchssl.pretrain.network import Network, masked_tokens
from patchssl.pretrain.pairs import MatchPlan
from patchssl.pretrain.schedules import StepValues
from patchssl.runtime.distributed import all_reduce_mean


class Batch(NamedTuple):
    """Normalized views of B images and what was drawn for them, on the training device."""

    globals_: Tensor  # (B, G, 3, S, S)
    locals_: Tensor  # (B, L, 3, s, s)
    drop_path: Tensor  # (B, G + L, places) uniform in [0, 1), see `patchssl.pretrain.droppath`
    masks: Tensor | None = None  # (B, G, N_global) bool: patches of global views that the student does not see


class Targets(NamedTuple):
    """What the teacher says: probabilities over prototypes, and what centers and matching need of its tokens."""

    class_probs: Tensor  # (B, G, K)
    patches: TeacherTokens | Tensor  # of MatchPlan.teacher_tokens; probabilities (T, K) under sinkhorn
    class_tokens: Tensor  # (B * G, D)
    patch_tokens: Tensor  # (B, G, N, D)
    class_mean: Tensor  # (1, bottleneck): mean over all class tokens
    patch_mean: Tensor  # (1, bottleneck) or (N, bottleneck): over all patch tokens, or all at one position


class Losses(NamedTuple):
    """Loss terms of one batch, and the student's class logits for health."""

    total: Tensor
    class_term: Tensor
    patch_term: Tensor
    class_logits: Tensor  # (B, V, K)
    patch_stats: MatchStats


@torch.no_grad()
def teacher_targets(teacher: Network, centers: Centers, globals_: Tensor, plan: MatchPlan, values: StepValues,
                    config: LossConfig) -> Targets:
    """The teacher's targets for normalized global views (B, G, 3, S, S); the centers stay as they are."""
    shape = globals_.shape[:2]
    tokens = teacher.backbone.tokens(globals_.flatten(0, 1))
    class_tokens, patch_tokens = tokens[:, 0], tokens[:, 1:]
    class_bottleneck = teacher.head.bottleneck(class_tokens)
    class_logits = teacher.head.last_layer(class_bottleneck)
    class_mean = class_bottleneck.float().mean(0, keepdim=True)
    class_probs = (sinkhorn(class_logits, values.teacher_temp) if config.centering == "sinkhorn"
                   else teacher_probs(class_logits, centers.class_token.value, values.teacher_temp))
    patches, patch_mean = _patch_targets(teacher, centers.patch_tokens, patch_tokens, plan, values, config)
    return Targets(class_probs.unflatten(0, shape), patches, class_tokens, patch_tokens.unflatten(0, shape),
                   class_mean, patch_mean)


def _patch_targets(teacher: Network, center: EmaCenter | None, patch_tokens: Tensor, plan: MatchPlan,
                   values: StepValues, config: LossConfig) -> tuple[TeacherTokens | Tensor, Tensor]:
    """What the plan's teacher tokens say, and the mean bottleneck of all patch tokens (B * G, N, D)."""
    head, positions = teacher.head, patch_tokens.shape[1]
    if center is None:  # DINO compares no patch tokens
        none = patch_tokens.new_zeros(0, head.last_layer.num_prototypes, dtype=torch.float32)
        return none, none.new_zeros(1)
    if config.centering == "sinkhorn":  # has no center: tokens that nobody matches are left alone
        logits = head.patch_layer(head.bottleneck(patch_tokens.flatten(0, 1).index_select(0, plan.teacher_tokens)))
        return sinkhorn(logits, values.patch_teacher_temp), logits.new_zeros(1)
    every = head.bottleneck(patch_tokens)
    matched = every.flatten(0, 1).index_select(0, plan.teacher_tokens)
    of_place = len(center.value) > 1
    mean = every.float().mean(0) if of_place else every.float().flatten(0, 1).mean(0, keepdim=True)
    position = plan.teacher_tokens % positions if of_place else None
    return TeacherTokens(matched, head.patch_layer.rows(), center.value, values.patch_teacher_temp, position), mean


def student_losses(student: Network, batch: Batch, targets: Targets, plan: MatchPlan, patch_weight: float,
                   config: LossConfig) -> Losses:
    """Loss terms of the student on a batch, given the teacher's targets."""
    tokens = student_tokens(student, batch)
    if config.rule == "similarity":
        plan = nearest_teacher(plan, targets.patch_tokens, [x[..., 1:, :] for x in tokens])
    class_tokens = torch.cat([x[..., 0, :] for x in tokens], dim=1)
    class_logits = student.head(class_tokens)
    patch_tokens = torch.cat([x[..., 1:, :].flatten(0, 2) for x in tokens]).index_select(0, plan.student_tokens)
    class_term = class_loss(class_logits, targets.class_probs, plan.class_weight, config.student_temp)
    patch_sum, stats = matched_cross_entropy(student.head.bottleneck(patch_tokens), student.head.patch_layer.rows(),
                                             targets.patches, plan.groups, plan.teacher, plan.weight,
                                             config.student_temp)
    patch_term = patch_sum / plan.num_pairs.clamp(min=1e-6)
    return Losses(class_term + patch_weight * patch_term, class_term, patch_term, class_logits, stats)


def student_tokens(student: Network, batch: Batch) -> list[Tensor]:
    """Tokens (B, V, 1 + N, D) of the global and, where there are any, of the local views."""
    views = [v for v in (batch.globals_, batch.locals_) if v.shape[1]]
    draws = batch.drop_path.split([v.shape[1] for v in views], dim=1)
    return [_student_tokens(student, v, d, m) for v, d, m in zip(views, draws, (batch.masks, None), strict=False)]


def _student_tokens(student: Network, views: Tensor, drop_path: Tensor, masks: Tensor | None) -> Tensor:
    """Tokens (B, V, 1 + N, D) of views (B, V, 3, S, S)."""
    set_drop_path_draws(student.backbone, drop_path.flatten(0, 1))
    flat = views.flatten(0, 1)
    if masks is None or student.mask_token is None:
        tokens = student.backbone.tokens(flat)
    else:
        tokens = masked_tokens(student.backbone, flat, student.mask_token[0], masks.flatten(0, 1))
    return tokens.unflatten(0, views.shape[:2])


@torch.no_grad()
def nearest_teacher(plan: MatchPlan, teacher_patches: Tensor, student_patches: Sequence[Tensor]) -> MatchPlan:
    """The plan with each match's teacher token: of its view the one with the highest cosine similarity.

    `teacher_patches` (B, G, N, D); `student_patches` are (B, S, n, D) for global and for local views. The rule of
    DenseCL (arXiv 2011.09157) and EsViT (arXiv 2106.09785).
    """
    num_global, positions = teacher_patches.shape[1:3]
    teacher = F.normalize(teacher_patches.float(), dim=-1)
    best = []
    for patches in student_patches:
        likeness = torch.einsum("btpd,bsqd->tbsqp", teacher, F.normalize(patches.detach().float(), dim=-1))
        best.append(likeness.argmax(-1).flatten(1))  # (G, tokens of the group)
    view = (plan.teacher // positions) % num_global
    token = plan.student_tokens[plan.student]
    return plan._replace(teacher=plan.teacher + torch.cat(best, dim=1)[view, token])


def sync_num_pairs(plans: Sequence[MatchPlan]) -> list[MatchPlan]:
    """Plans of an update's parts whose mean, over parts and processes, is that of one whole batch."""
    pairs = all_reduce_mean(torch.stack([plan.num_pairs for plan in plans]).mean()).clamp(min=1e-6)
    return [plan._replace(num_pairs=pairs) for plan in plans]
