"""What the numbers of a network's weights say about it: values that are not finite, empty tensors, no training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from patchssl.runtime.text import shortened

NAMED_TENSORS = 3  # in a sentence
COUNTED_AT_ONCE = 2**22  # numbers


class Soundness(NamedTuple):
    """What is wrong, in sentences, and whether every number is finite."""

    trouble: tuple[str, ...]
    finite: bool


class Extent(NamedTuple):
    """The range of a tensor's numbers, not finite where one of them is not."""

    low: float
    high: float
    ndim: int

    def is_all(self, value: float) -> bool:
        """Is every number `value`?"""
        return self.low == self.high == value


@torch.no_grad()
def check_numbers(tensors: Mapping[str, Tensor]) -> Soundness:
    """Look at the `tensors` of a backbone in timm's names, each asked for once, and again if it is not finite."""
    extents = {name: extent for name in sorted(tensors) if (extent := extent_of(tensors[name])) is not None}
    broken = [name for name, extent in extents.items() if not math.isfinite(abs(extent.low) + abs(extent.high))]
    return Soundness((*_not_finite(tensors, broken), *_zeros(extents), *_untrained(extents)), finite=not broken)


def extent_of(tensor: Tensor) -> Extent | None:
    """None for a tensor without floating-point numbers."""
    if not (is_plain(tensor) and tensor.is_floating_point() and tensor.numel()):
        return None
    low, high = tensor.aminmax()  # makes no copy, and gives what is not a number if there is one
    return Extent(float(low), float(high), tensor.ndim)


def is_plain(tensor: Tensor) -> bool:
    """Does `tensor` hold its numbers one by one: not sparse, not quantized, not without content?"""
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta


def _not_finite(tensors: Mapping[str, Tensor], names: list[str]) -> list[str]:
    nans = infinite = 0
    for name in names:
        for part in tensors[name].reshape(-1).split(COUNTED_AT_ONCE):
            nans += int(part.isnan().sum())
            infinite += int(part.isinf().sum())
    verb = "hold" if len(names) > 1 else "holds"
    return [f"{_count(names)} {verb} {nans:,} NaN and {infinite:,} infinite values: "
            f"{shortened(names, NAMED_TENSORS)}"] if names else []


def _zeros(extents: Mapping[str, Extent]) -> list[str]:
    """Weights and positions that are zero throughout; a bias or a class token may be, and a batch norm's scale."""
    batch_norms = _has_batch_norms(extents)
    names = [name for name, extent in extents.items() if extent.is_all(0) and (
        name == "pos_embed" or (name.endswith(".weight") and (extent.ndim > 1 or not batch_norms)))]
    verb = "are" if len(names) > 1 else "is"
    return [f"{_count(names)} {verb} zero throughout: {shortened(names, NAMED_TENSORS)}"] if names else []


def _untrained(extents: Mapping[str, Extent]) -> list[str]:
    """A sentence where no norm weight and no bias has left the value it starts at: one update moves both."""
    ends = {0, 1} if _has_batch_norms(extents) else {1}  # the last norm of a ResNet's block starts at 0
    norms = [any(map(extent.is_all, ends)) for name, extent in extents.items()
             if name.endswith(".weight") and extent.ndim == 1]
    biases = [extent.is_all(0) for name, extent in extents.items()  # that of the cut into patches is drawn
              if name.endswith(".bias") and not name.startswith("patch_embed.")]
    untouched = norms and biases and all(norms + biases)
    return ["looks untrained: all norm weights and biases are exactly what they start at"] if untouched else []


def _has_batch_norms(extents: Mapping[str, Extent]) -> bool:
    return any(name.endswith("running_mean") for name in extents)


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) > 1)}"
