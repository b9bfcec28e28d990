"""What student and teacher must agree on: class tokens, and patch tokens matched across views.

Views are ordered globals first; a pair is (teacher view t, student view s) with t != s. Everything that needs
geometry only is planned on the CPU (`plan_matches`), so that the step itself has no data-dependent shape to wait for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from patchssl.geometry import Crops, patches_per_side
from patchssl.matching import match_crops
from patchssl.pretrain.config import Recipe


class MatchPlan(NamedTuple):
    """Which tokens of a batch are projected, which are compared, and what each comparison weighs.

    Student tokens are numbered over (B, G, N_global) and then (B, L, N_local), teacher tokens over (B, G, N_global).
    """

    student_tokens: Tensor  # (S,) int64, ascending: every student token with a match, once
    teacher_tokens: Tensor  # (T,) int64, ascending: every teacher token with a match, once
    student: Tensor  # (M,) int64: of each match, its row in student_tokens
    teacher: Tensor  # (M,) int64: and its row in teacher_tokens
    weight: Tensor  # (M,) float32
    class_weight: Tensor  # (B, G, V) float32: weight of each (image, teacher view, student view), 0 for t == s
    matched_share: Tensor  # (2,) float32: share of student patches with a match, in global and in local views

    def to(self, device: torch.device) -> MatchPlan:
        """The plan on `device`, copied without waiting."""
        return MatchPlan(*(tensor.to(device, non_blocking=True) for tensor in self))


def plan_matches(boxes: Tensor, mirrored: Tensor, recipe: Recipe) -> MatchPlan:
    """Plan the comparisons of a batch from its geometry: `boxes` (B, V, 4) and `mirrored` (B, V), globals first."""
    num_images, num_views = mirrored.shape
    num_global = recipe.views.num_global
    class_weight = torch.ones(num_images, num_global, num_views)
    class_weight[:, torch.arange(num_global), torch.arange(num_global)] = 0
    class_weight /= num_images * num_global * (num_views - 1)
    if recipe.method == "dino":
        return _class_only(class_weight)
    groups = [_match_group(boxes, mirrored, recipe, local) for local in (False, True)[: 1 + (num_views > num_global)]]
    student, teacher, pair = (torch.cat(parts) for parts in zip(*(group[:3] for group in groups), strict=True))
    counts = torch.bincount(pair, minlength=class_weight.numel())  # matches M of each (image, t, s)
    if recipe.loss.weighting == "paper":
        class_weight = class_weight / (1 + counts.view_as(class_weight))
        weight = class_weight.flatten()[pair]
    else:
        weight = 1 / (counts[pair] * (counts > 0).sum()).float()
    student_tokens, student = student.unique(return_inverse=True)
    teacher_tokens, teacher = teacher.unique(return_inverse=True)
    share = torch.tensor([group[3] for group in groups] + [0.0] * (2 - len(groups)))
    return MatchPlan(student_tokens, teacher_tokens, student, teacher, weight, class_weight, share)


def _class_only(class_weight: Tensor) -> MatchPlan:
    none, empty = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    return MatchPlan(none, none, none, none, empty, class_weight, torch.zeros(2))


def _match_group(boxes: Tensor, mirrored: Tensor, recipe: Recipe, local: bool) -> tuple[Tensor, Tensor, Tensor, float]:
    """Matches between all global views and the global or local student views of every image.

    Returns student and teacher token numbers, the flat number of each match's (image, t, s), and the share of
    student patches with a match over all pairs.
    """
    views, patch = recipe.views, recipe.model.patch_size
    num_images, num_views = mirrored.shape
    num_global = views.num_global
    chosen = slice(num_global, None) if local else slice(num_global)
    size = views.local_size if local else views.global_size
    teacher_crops = Crops(boxes[:, :num_global, None], mirrored[:, :num_global, None], views.global_size)
    student_crops = Crops(boxes[:, None, chosen], mirrored[:, None, chosen], size)
    ids = match_crops(teacher_crops, student_crops, patch, recipe.loss.rule)  # (B, G, S, N), -1 where none
    if not local:
        ids[:, torch.arange(num_global), torch.arange(num_global)] = -1
    image, t, s, patch_id = (ids >= 0).nonzero(as_tuple=True)
    per_teacher = patches_per_side(views.global_size, patch) ** 2
    teacher = (image * num_global + t) * per_teacher + ids[image, t, s, patch_id]
    student = (image * ids.shape[2] + s) * ids.shape[3] + patch_id
    student += num_images * num_global * per_teacher if local else 0
    pair = (image * num_global + t) * num_views + s + (num_global if local else 0)
    pairs = num_images * (num_global * ids.shape[2] - (0 if local else num_global))
    return student, teacher, pair, len(image) / max(1, pairs * ids.shape[3])


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
    views share nothing gives a zero that still has a gradient.
    """
    log_probs = F.log_softmax(student_logits.float() / student_temp, dim=-1)
    target = torch.zeros_like(log_probs)
    for student, teacher, weight in _chunks(plan):
        target.index_add_(0, student, weight[:, None] * teacher_probs[teacher])
    return -(target * log_probs).sum()


def _chunks(plan: MatchPlan, size: int = 4096) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The matches a few thousand at a time, so that no (matches x prototypes) matrix is held."""
    return zip(plan.student.split(size), plan.teacher.split(size), plan.weight.split(size), strict=True)
