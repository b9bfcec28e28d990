"""Pretraining: networks, losses and schedules, the engine that makes updates of them, and in `run` the life of a run.

`patchssl.pretrain(recipe, ...)` runs one: the package itself can be called, see `patchssl.pretrain.run.start.pretrain`.

The method, formula by formula, and where each stands below `patchssl` in its plain form; in brackets the fast form that
training has in its place, held equal by tests. Sources: PW-Self arXiv 2310.18651, DINO 2104.14294, iBOT 2111.07832.

    crops, and where they lie in the image           views.crops.draw_views, views.geometry.View
    whole-view and patch-wise color                  views.plaincolor.color_view (views.color.layer_colors)
    ... of one patch                                 views.plaincolor.change_patch (views.patchcolor.apply_patches)
    matched patches of two views                     views.matching.match_patches (views.matching.match_crops)
    logits: prototypes * MLP(token) / |MLP(token)|   pretrain.head.ProjectionHead
    p = softmax((t - center) / teacher_temp)         pretrain.centering.teacher_probs
    center <- m center + (1 - m) mean(t)             pretrain.centering.ema_center (pretrain.centering.EmaCenter.update)
    or, without a center, Sinkhorn's balancing       pretrain.centering.sinkhorn
    H(p, s) = -sum p log softmax(s / student_temp)   pretrain.losses.pair_losses
        (of class tokens pretrain.losses.class_loss, of patches pretrain.crossentropy.matched_cross_entropy)
    L_class + patch_weight L_patch                   pretrain.losses.pwself_loss (pretrain.pairs.plan_matches weighs)
        (or a pair's class token weighs 1 / (1 + M), or class_share beside the mean or sum of its matches)
    iBOT: masks, and what is compared under them     views.masks.draw_masks, pretrain.pairs.plan_masked
    teacher <- m teacher + (1 - m) student           pretrain.teacher.update_teacher
    temperatures, momentum, rates over time          pretrain.schedules.values_at
    all of it, for one batch and for one update      pretrain.distill.student_losses, pretrain.engine.Engine.update
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """The contract has one name for the package and for what it does."""

    def __call__(self, *args: Any, **kwargs: Any) -> Path:
        from patchssl.pretrain.run.start import pretrain

        return pretrain(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
