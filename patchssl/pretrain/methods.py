"""The forward pass of a method: views to losses. PW-Self and DINO differ in the recipe only.

The student sees all views, the teacher the global ones; the loss is H(teacher, student), never of a view with itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from patchssl.backbone import VitBackbone
from patchssl.pretrain.config import LossConfig, Recipe
from patchssl.pretrain.drop_path import set_drop_path_draws
from patchssl.pretrain.head import ProjectionHead
from patchssl.pretrain.loss import MatchPlan, class_loss, patch_loss
from patchssl.pretrain.schedules import StepValues
from patchssl.pretrain.teacher import EmaCenter, sinkhorn


class Network(nn.Module):
    """A backbone and its projection head: what student and teacher both are."""

    def __init__(self, backbone: VitBackbone, head: ProjectionHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head


class Centers(nn.Module):
    """EMA centers of class and patch tokens; DINO, which compares no patch tokens, has none for them."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        patches = (recipe.views.global_size // recipe.model.patch_size) ** 2
        positions = patches if recipe.loss.center_per_position else 1
        size, momentum = recipe.head.num_prototypes, recipe.loss.center_momentum
        self.class_token = EmaCenter(size, momentum)
        self.patch_tokens = None if recipe.method == "dino" else EmaCenter(size, momentum, positions)


class Targets(NamedTuple):
    """What the teacher says: probabilities over prototypes, and the class tokens they came from."""

    class_probs: Tensor  # (B, G, K)
    patch_probs: Tensor  # (T, K), rows of MatchPlan.teacher_tokens
    class_tokens: Tensor  # (B * G, D)


class Losses(NamedTuple):
    """Loss terms of one batch, and the student's class logits for health."""

    total: Tensor
    class_term: Tensor
    patch_term: Tensor
    class_logits: Tensor  # (B, V, K)


@torch.no_grad()
def teacher_targets(teacher: Network, centers: Centers, globals_: Tensor, plan: MatchPlan, values: StepValues,
                    config: LossConfig) -> Targets:
    """The teacher's targets for normalized global views (B, G, 3, S, S); moves the centers afterwards, as DINO does."""
    batch, num_global = globals_.shape[:2]
    tokens = teacher.backbone.tokens(globals_.flatten(0, 1))
    positions = tokens.shape[1] - 1
    class_tokens, patch_tokens = tokens[:, 0], tokens[:, 1:].flatten(0, 1)
    class_bottleneck = teacher.head.bottleneck(class_tokens)
    class_logits = teacher.head.last_layer(class_bottleneck)
    if config.centering == "sinkhorn":
        patch_logits = teacher.head(patch_tokens[plan.teacher_tokens])
        probs = [sinkhorn(logits, values.teacher_temp) if len(logits) else logits.float()
                 for logits in (class_logits, patch_logits)]
    elif centers.patch_tokens is None:
        patch_logits = class_logits[:0]
        probs = [_sharpen(class_logits, centers.class_token.value, values), patch_logits.float()]
        centers.class_token.update(teacher.head, class_bottleneck.unsqueeze(1))
    else:
        bottleneck = teacher.head.bottleneck(patch_tokens)
        patch_logits = teacher.head.last_layer(bottleneck[plan.teacher_tokens])
        center = centers.patch_tokens.value
        center = center[plan.teacher_tokens % positions] if len(center) > 1 else center
        probs = [_sharpen(class_logits, centers.class_token.value, values), _sharpen(patch_logits, center, values)]
        centers.class_token.update(teacher.head, class_bottleneck.unsqueeze(1))
        centers.patch_tokens.update(teacher.head, bottleneck.unflatten(0, (-1, positions)))
    return Targets(probs[0].unflatten(0, (batch, num_global)), probs[1], class_tokens)


def student_losses(student: Network, globals_: Tensor, locals_: Tensor, drop_path: Tensor, targets: Targets,
                   plan: MatchPlan, patch_weight: float, config: LossConfig) -> Losses:
    """Loss terms of the student on normalized views (B, G, 3, S, S) and (B, L, 3, s, s).

    `drop_path` (B, G + L, places) are uniform draws in [0, 1), see `patchssl.pretrain.drop_path`.
    """
    views = [v for v in (globals_, locals_) if v.shape[1]]
    draws = drop_path.split([v.shape[1] for v in views], dim=1)
    tokens = [_student_tokens(student, v, d) for v, d in zip(views, draws, strict=True)]
    class_tokens = torch.cat([x[:, 0].unflatten(0, v.shape[:2]) for x, v in zip(tokens, views, strict=True)], dim=1)
    patch_tokens = _take_patches(tokens, plan.student_tokens)
    split = class_tokens.shape[0] * class_tokens.shape[1]
    logits = student.head(torch.cat([class_tokens.flatten(0, 1), patch_tokens]))
    class_logits = logits[:split].unflatten(0, class_tokens.shape[:2])
    class_term = class_loss(class_logits, targets.class_probs, plan.class_weight, config.student_temp)
    patch_term = patch_loss(logits[split:], targets.patch_probs, plan, config.student_temp)
    return Losses(class_term + patch_weight * patch_term, class_term, patch_term, class_logits)


def _student_tokens(student: Network, views: Tensor, drop_path: Tensor) -> Tensor:
    set_drop_path_draws(student.backbone, drop_path.flatten(0, 1))
    return student.backbone.tokens(views.flatten(0, 1))


def _sharpen(logits: Tensor, center: Tensor, values: StepValues) -> Tensor:
    return ((logits.float() - center) / values.teacher_temp).softmax(dim=-1)


def _take_patches(tokens: list[Tensor], chosen: Tensor) -> Tensor:
    """Rows `chosen` of the patch tokens of all views, numbered as in `MatchPlan`."""
    return torch.cat([x[:, 1:].flatten(0, 1) for x in tokens])[chosen]
