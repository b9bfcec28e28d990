"""A set of a few images in memory, of any sizes, and when two samples or batches of its views are the same."""

from dataclasses import dataclass

import numpy as np

from patchssl.pretrain.dataset import ViewBatch, ViewSample
from patchssl.runtime.errors import UnreadableImage


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
