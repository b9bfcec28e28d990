"""A set of a few images in memory, of any sizes, and when two samples or batches of its views are the same."""

from dataclasses import dataclass

import numpy as np
import torch

from patchssl.pretrain.dataset import ViewBatch, ViewSample
from patchssl.runtime.errors import UnreadableImage
from patchssl.views.geometry import Crops, patch_centers


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@dataclass
class FewImages:
    """A set in memory; an image that is None cannot be read."""

    images: list
    name: str = "few"

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, index: int) -> np.ndarray:
        if self.images[index] is None:
            raise UnreadableImage(f"{index}.jpg", "truncated")
        return self.images[index]


def assert_equal(one: ViewSample | ViewBatch, other: ViewSample | ViewBatch) -> None:
    for name in one.__slots__:
        a, b = getattr(one, name), getattr(other, name)
        if isinstance(a, int | tuple) and not hasattr(a, "_fields"):
            assert a == b, name
        else:
            for x, y in zip(*((v if isinstance(v, tuple) else (v,)) for v in (a, b)), strict=True):
                assert np.array_equal(np.asarray(x), np.asarray(y)), name


def means_and_centers(sample):
    """Mean red and green of every patch of 8 px, and the row and column of its center by geometry, view by view."""
    for views, chosen in ((sample.global_views, slice(0, 2)), (sample.local_views, slice(2, 4))):
        crops = Crops(torch.from_numpy(sample.boxes[chosen]), torch.from_numpy(sample.mirrored[chosen]),
                      views.shape[-1])
        patches = views.double().unfold(2, 8, 8).unfold(3, 8, 8).mean((-2, -1)).flatten(2)
        yield from zip((patches[:, 0], patches[:, 1]), patch_centers(crops, 8), strict=True)
