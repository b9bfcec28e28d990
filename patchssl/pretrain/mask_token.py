"""The mask token: what a network sees in place of patches that are hidden from it (iBOT, arXiv 2111.07832)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from patchssl.backbone import VitBackbone


def replace_patches(patches: Tensor, masks: Tensor, mask_token: Tensor) -> Tensor:
    """`patches` (B, ..., D) with `mask_token` (D,) in all places that `masks` (B, N) names, N places row by row.

    Raises ValueError when the masks are of other images or grids.
    """
    if masks.shape != patches.flatten(1, -2).shape[:2]:
        raise ValueError(f"masks of shape {tuple(masks.shape)} for patches of shape {tuple(patches.shape)}")
    return torch.where(masks.view(*patches.shape[:-1], 1), mask_token.to(patches.dtype), patches)


def masked_tokens(backbone: VitBackbone, images: Tensor, mask_token: Tensor, masks: Tensor) -> Tensor:
    """The backbone's tokens (B, 1 + N, D) of `images` (B, 3, H, W) whose masked patches it does not see.

    `mask_token` (D,) takes the places that are true in `masks` (B, N) after the patch embedding, before positions
    are added. It belongs to the caller: the backbone's own weights, names and later calls stay as they are.
    """

    def replaced(module: nn.Module, inputs: Any, patches: Tensor) -> Tensor:
        return replace_patches(patches, masks, mask_token)

    hook = backbone.module.patch_embed.register_forward_hook(replaced)
    try:
        return backbone.tokens(images)
    finally:
        hook.remove()
