"""From an image to a network's input: resizing, cropping, normalization, as a protocol says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from patchssl.runtime.errors import UsageError

_RESAMPLING = MappingProxyType({name: Image.Resampling[name.upper()] for name in ("bicubic", "bilinear", "lanczos")})


@dataclass(frozen=True)
class ImageTransform:
    """(H, W, 3) uint8 to (3, h, w) uint8 by plain `settings`; tasks of equal settings share one pass.

    `resize` and `crop`: see `crop_image`. `resize` alone: the short side to that many pixels, nothing cut away.
    `square`: to that many pixels on either side, the aspect lost. None of them: the pixels as they are.
    """

    settings: Mapping[str, Any]

    def __call__(self, pixels: np.ndarray) -> Tensor:
        if "crop" in self.settings:
            return crop_image(pixels, self.settings)
        if "square" in self.settings:
            side = self.settings["square"]
            image = Image.fromarray(pixels)
            if image.size != (side, side):
                image = image.resize((side, side), _RESAMPLING[self.settings["interpolation"]])
            pixels = np.array(image)
        elif "resize" in self.settings:
            image = Image.fromarray(pixels)
            pixels = np.array(_resize_short(image, self.settings["resize"], self.settings["interpolation"]))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def native_resize(image_size: int) -> int:
    """Short side in pixels before the center crop: `image_size` x 256/224, below 64 px `image_size` itself.

    >>> [native_resize(size) for size in (28, 64, 96, 224)]
    [28, 73, 110, 256]
    """
    if image_size < 1:
        raise UsageError(f"a training size of {image_size} pixels holds no image")
    return image_size if image_size < 64 else round(image_size * 256 / 224)


def crop_image(pixels: np.ndarray, settings: Mapping[str, Any]) -> Tensor:
    """(H, W, 3) uint8 to (3, crop, crop) uint8: short side to `resize` pixels, then the center.

    Settings: `resize` >= `crop` and `interpolation`. Equal to torchvision's Resize and CenterCrop on PIL
    images.
    """
    resize, crop = settings["resize"], settings["crop"]
    if resize < crop:
        raise ValueError(f"a crop of {crop} pixels does not fit into a short side of {resize} pixels")
    image = _resize_short(Image.fromarray(pixels), resize, settings["interpolation"])
    left, top = round((image.width - crop) / 2), round((image.height - crop) / 2)
    cut = np.array(image.crop((left, top, left + crop, top + crop)))
    return torch.from_numpy(cut).permute(2, 0, 1).contiguous()


def _resize_short(image: Image.Image, side: int, interpolation: str) -> Image.Image:
    """`image` with a short side of `side` pixels, as torchvision's Resize gives it."""
    short, long = min(image.size), max(image.size)
    if short == side:
        return image
    long = int(side * long / short)  # torchvision truncates
    size = (side, long) if image.width <= image.height else (long, side)
    return image.resize(size, _RESAMPLING[interpolation])


def normalize_images(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(..., 3, H, W) uint8 to float32: divided by 255, minus `mean`, divided by `std`, both (3,)."""
    return TF.normalize(images.to(torch.float32).div_(255), list(mean), list(std), inplace=True)
