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
    _require_tokens(patches, "patch tokens (images, patches, dimensions)")
    if not (p > 0 and minimum > 0):
        raise UsageError(f"GeM needs an exponent and a minimum above 0, not {p} and {minimum}")
    exact = patches if patches.dtype == torch.float64 else patches.float()
    return exact.clamp(min=minimum).pow(p).mean(dim=1).pow(1 / p)


def mean_patch(patches: Tensor) -> Tensor:
    """Plain mean over patch tokens: (B, N, D) -> (B, D)."""
    _require_tokens(patches, "patch tokens (images, patches, dimensions)")
    return patches.mean(dim=1)


def class_and_gem(tokens: Tensor, p: float = 4.0) -> Tensor:
    """[class token, GeM of the patch tokens]: (B, 1 + N, D), class token first -> (B, 2 D), for copy detection."""
    _require_tokens(tokens, "a class token and patch tokens", least=2)
    pooled = gem(tokens[:, 1:], p)
    return torch.cat([tokens[:, 0].to(pooled.dtype), pooled], dim=1)


def class_and_mean(tokens: Tensor) -> Tensor:
    """Class token and mean patch token interleaved: (B, 1 + N, D), class token first -> (B, 2 D).

    The order is class0, mean0, class1, mean1, ...: DINO's published linear weights for ViT-B expect it
    (facebookresearch/dino, eval_linear.py, `--avgpool_patchtokens`).
    """
    _require_tokens(tokens, "a class token and patch tokens", least=2)
    return torch.stack([tokens[:, 0], mean_patch(tokens[:, 1:])], dim=2).flatten(1)


def _require_tokens(tokens: Tensor, what: str, least: int = 1) -> None:
    if tokens.ndim != 3 or tokens.shape[1] < least:
        raise UsageError(f"pooling was given the shape {tuple(tokens.shape)}; it needs {what}")
