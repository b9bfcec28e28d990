"""What iBOT compares: a masked patch of the student with the same patch of the same view, which the teacher sees."""

from __future__ import annotations

import torch
from torch import Tensor

from patchssl.pretrain.config import Recipe
from patchssl.pretrain.cross_entropy import group_matches
from patchssl.pretrain.match_plan import MatchPlan, even_class_weight


def plan_masked(masks: Tensor, recipe: Recipe) -> MatchPlan:
    """Plan the comparisons of a batch from its `masks` (B, G, N) of global views, on the CPU.

    The patch term is the mean over images and global views of a view's mean over masked patches; a view without any
    counts as 0, as in bytedance/ibot's main_ibot.py. Class tokens are compared between all different views.
    """
    num_images, num_global, positions = masks.shape
    tokens = masks.flatten().nonzero()[:, 0]
    rows = torch.arange(len(tokens))
    counts = masks.sum(-1)  # (B, G)
    weight = (1 / (counts.clamp(min=1) * counts.numel())).flatten()[tokens // positions]
    image = tokens // (num_global * positions)
    share = torch.stack([masks.float().mean(), torch.zeros(())])
    return MatchPlan(tokens, tokens, rows, rows, weight, torch.ones(()),
                     even_class_weight(num_images, num_global, recipe.views.num_views), share,
                     group_matches(rows, image, image))
