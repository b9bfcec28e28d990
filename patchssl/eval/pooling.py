"""One vector per image from a network's tokens, as DINO's evaluations pool them, each by the name of an output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patchssl.models.backbone import Backbone
from patchssl.runtime.errors import UsageError, unknown_choice

OUTPUTS = ("features", "class:N", "mean_patch", "gem:P")


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


def compute_outputs(backbone: Backbone, images: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
    """The named outputs, each (B, D), of normalized images (B, 3, H, W) by one forward pass."""
    wanted = {output: parse_output(output) for output in outputs}
    found: dict[str, Tensor] = {}
    if set(outputs) == {"features"}:
        return {"features": backbone.features(images)}
    if not backbone.has_class_token and any(kind == "class" for kind, _ in wanted.values()):
        raise UsageError(f"{backbone.arch} has no class token, {', '.join(outputs)} were asked for")
    last = max((int(number) for kind, number in wanted.values() if kind == "class"), default=1)
    class_tokens, patches = backbone.encode(images, last)
    for output, (kind, number) in wanted.items():
        if kind == "features":
            found[output] = class_tokens[:, -1] if backbone.has_class_token else backbone.features(images)
        elif kind == "class":
            found[output] = class_tokens[:, -int(number) :].flatten(1)
        else:
            found[output] = mean_patch(patches) if kind == "mean_patch" else gem(patches, number)
    return found


def parse_output(output: str) -> tuple[str, float]:
    """The kind and number of an output's name: ("class", 4) of class:4."""
    kind, _, number = output.partition(":")
    try:
        value = float(number) if number else 1.0
    except ValueError:
        value = 0.0
    if kind not in ("features", "class", "mean_patch", "gem") or not value >= 1 or (kind == "class" and value % 1):
        raise UsageError(unknown_choice("output", output, OUTPUTS))
    return kind, value
