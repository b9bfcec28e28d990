"""One vector per image from the tokens of a Vision Transformer, as DINO's evaluations pool them."""

from __future__ import annotations

import torch
from torch import Tensor

from patchssl.runtime.errors import UsageError


def gem(patches: Tensor, p: float = 4.0, minimum: float = 1e-6) -> Tensor:
    """Generalized mean over patch tokens: (B, N, D) -> (B, D).

    (mean of max(x, `minimum`)^p)^(1/p) per dimension; p = 1 is the mean of what is positive, a large p comes
    near the maximum. As in facebookresearch/dino, eval_copy_detection.py. Half precision is pooled in float32.
    """
    _require_patches(patches)
    if not (p > 0 and minimum > 0):
        raise UsageError(f"GeM needs an exponent and a minimum above 0, not {p} and {minimum}")
    exact = patches if patches.dtype == torch.float64 else patches.float()
    return exact.clamp(min=minimum).pow(p).mean(dim=1).pow(1 / p)


def mean_patch(patches: Tensor) -> Tensor:
    """Plain mean over patch tokens: (B, N, D) -> (B, D)."""
    _require_patches(patches)
    return patches.mean(dim=1)


def _require_patches(patches: Tensor) -> None:
    if patches.ndim != 3 or not patches.shape[1]:
        raise UsageError(f"pooling was given the shape {tuple(patches.shape)}; it needs patch tokens "
                         "(images, patches, dimensions)")
