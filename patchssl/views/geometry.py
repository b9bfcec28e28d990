"""Where a view came from, and which source pixels its patches cover.

`View` is one crop; `Crops` is any batch of crops of one size as tensors, for matching without a Python loop.
Source coordinates are pixels with half-open extents: pixel (r, c) covers [r, r + 1) x [c, c + 1).
Patch ids are row-major from 0 in the view as the network sees it, so after mirroring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class View:
    """Where a view came from: a crop in source pixels, perhaps mirrored, resized to size x size."""

    top: float
    left: float
    height: float
    width: float
    mirrored: bool
    size: int  # pixels of the square view

    def __post_init__(self) -> None:
        if not (self.height > 0 and self.width > 0 and self.size > 0):
            raise ValueError(f"{self} holds no pixel")

    def contains(self, y: Tensor, x: Tensor) -> Tensor:
        """Which source points (pixels) lie inside the crop: half open, like the pixels themselves."""
        bottom, right = self.top + self.height, self.left + self.width
        return (self.top <= y) & (y < bottom) & (self.left <= x) & (x < right)


class Crops(NamedTuple):
    """A batch of crops that are all resized to `size` x `size` pixels; `...` is any batch shape."""

    boxes: Tensor  # (..., 4) float64: top, left, height, width in source pixels
    mirrored: Tensor  # (...) bool
    size: int

    @classmethod
    def of(cls, views: Sequence[View]) -> Crops:
        """The crops of `views`, which share one size, as a batch of shape (len(views),)."""
        sizes = {view.size for view in views}
        if len(sizes) != 1:
            raise ValueError(f"crops of one batch share one size, these have {sorted(sizes)}")
        boxes = torch.tensor([[v.top, v.left, v.height, v.width] for v in views], dtype=torch.float64)
        return cls(boxes, torch.tensor([v.mirrored for v in views]), sizes.pop())


def patches_per_side(size: int, patch_size: int) -> int:
    """Patches along one side of a view of `size` pixels; ValueError unless it is a whole number."""
    if patch_size < 1 or size % patch_size or size < patch_size:
        raise ValueError(f"a view of {size} pixels is no whole number of patches of {patch_size} pixels")
    return size // patch_size


def patch_centers(crops: Crops, patch_size: int) -> tuple[Tensor, Tensor]:
    """Source coordinates (y, x), each (..., N) float64, of the centers of all N patches, by patch id."""
    n = patches_per_side(crops.size, patch_size)
    odd = torch.arange(1, 2 * n, 2, dtype=torch.float64, device=crops.boxes.device)
    top, left, height, width = crops.boxes.unsqueeze(-1).unbind(-2)
    across = torch.where(crops.mirrored.unsqueeze(-1), 2 * n - odd, odd)
    # one rounded division: a center that falls on a whole pixel is that pixel exactly
    y = ((2 * n * top + height * odd) / (2 * n)).unsqueeze(-1).expand(*crops.boxes.shape[:-1], n, n)
    x = ((2 * n * left + width * across) / (2 * n)).unsqueeze(-2).expand(*crops.boxes.shape[:-1], n, n)
    return y.flatten(-2), x.flatten(-2)


def patch_at(crops: Crops, y: Tensor, x: Tensor, patch_size: int) -> Tensor:
    """Ids (..., N) int64 of the patches that contain the source points (y, x), each (..., N); -1 outside."""
    n = patches_per_side(crops.size, patch_size)
    top, left, height, width = crops.boxes.unsqueeze(-1).unbind(-2)
    inside = (top <= y) & (y < top + height) & (left <= x) & (x < left + width)
    row = ((y - top) * n / height).floor().clamp(0, n - 1).long()
    column = ((x - left) * n / width).floor().clamp(0, n - 1).long()
    column = torch.where(crops.mirrored.unsqueeze(-1), n - 1 - column, column)
    return torch.where(inside, row * n + column, -1)
