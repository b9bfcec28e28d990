"""Raw pixels as features: the baseline that any network has to beat."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from patchssl.models.backbone import Backbone, Origin
from patchssl.runtime.errors import UsageError
from patchssl.runtime.text import query_options


class RawPixels(Backbone):
    """The images themselves as features, (B, 3 * size * size) in [0, 1]: what a network has to beat."""

    sized = True  # False: nobody said a size, a benchmark may choose the images' own

    def __init__(self, size: int) -> None:
        origin = Origin(name=f"pixels-{size}", method="pixels")
        no_mean, no_std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        super().__init__(
            nn.Identity(),
            mean=no_mean,
            std=no_std,
            patch_size=1,
            image_size=size,
            arch="raw pixels",
            origin=origin,
        )

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    def patch_tokens(self, images: Tensor) -> Tensor:
        return pixel_tokens(images, self.patch_size)

    def encode(self, images: Tensor, last: int = 1) -> tuple[Tensor, Tensor]:
        """All pixels in the place of the class token (B, 1, 3 * size * size), and the patches' own; `last` is 1."""
        if last != 1:
            raise UsageError(f"raw pixels have no blocks, the last {last} were asked for")
        return self.features(images)[:, None], self.patch_tokens(images)


class PixelPatches(RawPixels):
    """Raw pixels whose patch tokens are the patches' own pixels (B, N, 3 * patch_size^2), in [0, 1].

    Default patch: the largest power of two that leaves a grid of 8 x 8 or more. UsageError unless the size is a whole
    number of patches.
    """

    def __init__(self, size: int, patch_size: int | None = None) -> None:
        super().__init__(size)
        fitting = (2**k for k in range(10, 0, -1) if size % 2**k == 0 and size // 2**k >= 8)
        self.patch_size = patch_size or next(fitting, 1)
        if size < self.patch_size or size % self.patch_size:
            raise UsageError(f"{size} pixels are no whole number of patches of {self.patch_size}")
        self.origin = Origin(name=f"pixels-{size}-{self.patch_size}", method="pixels")


def pixel_tokens(images: Tensor, patch_size: int) -> Tensor:
    """(B, 3, H, W) to the pixels (B, N, 3 * patch_size^2) of their patches, row-major."""
    return F.unfold(images, patch_size, stride=patch_size).transpose(1, 2)


PIXELS = "pixels"
_SIDE = 32  # of raw pixels whose size was not said
_OPTIONS = ("img_size", "patch_size")


def is_pixels(model: str) -> bool:
    """Does `model` mean raw pixels: `pixels`, or `pixels?img_size=32`?"""
    return model.partition("?")[0] == PIXELS


def open_pixels(model: str) -> RawPixels:
    """Raw pixels as `pixels?img_size=64` names them, in patches if a `patch_size` is said."""
    given = query_options(model.partition("?")[2], model, escaped=False)
    known = not set(given) - set(_OPTIONS) and (given or "?" not in model)
    if not known or not all(value.isdecimal() and int(value) for value in given.values()):
        raise UsageError(f"model '{model}' is not understood; write pixels, or with a size pixels?img_size=32, or with "
                         "the sizes of the model to compare with pixels?img_size=64&patch_size=8")
    sizes = {name: int(value) for name, value in given.items()}
    side = sizes.get("img_size", _SIDE)
    found = PixelPatches(side, sizes["patch_size"]) if "patch_size" in sizes else RawPixels(side)
    found.sized = "img_size" in sizes
    return found
