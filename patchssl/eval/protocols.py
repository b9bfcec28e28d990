"""Protocols are data: every setting that moves a number, under a name and with a fingerprint.

`resolve` turns a task and a name into the concrete record. Settings that depend on the size a network was
trained at are numbers by then, so two fingerprints are equal exactly when the numbers can be compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from patchssl.errors import UsageError, unknown_choice

_RESAMPLING = MappingProxyType({name: Image.Resampling[name.upper()] for name in ("bicubic", "bilinear", "lanczos")})


@dataclass(frozen=True)
class Protocol:
    """How a task is run: `settings` are plain JSON values and never change; `version` counts revisions."""

    task: str
    name: str
    version: int
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        # through JSON: nothing else than plain values, and no part shared with the caller
        plain = self.plain_settings()
        frozen = {key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()}
        object.__setattr__(self, "settings", MappingProxyType(frozen))

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __reduce__(self) -> tuple[type[Protocol], tuple[Any, ...]]:
        return Protocol, (self.task, self.name, self.version, dict(self.settings))

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of the sha256 of task, name, version and settings as canonical JSON."""
        settings = dict(self.settings)
        record = {"task": self.task, "name": self.name, "version": self.version, "settings": settings}
        return hashlib.sha256(_canonical(record).encode()).hexdigest()[:16]

    def plain_settings(self) -> dict[str, Any]:
        """A copy of the settings as a record holds them: lists, not tuples."""
        return dict(json.loads(_canonical(dict(self.settings))))

    def transform(self) -> ImageTransform:
        """The step from an image's pixels to what the network's normalization gets."""
        plain = self.plain_settings()
        keys = ("resize", "crop", "square", "interpolation")
        return ImageTransform({key: plain[key] for key in keys if key in plain})


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


def _canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values, equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def resolve(task: str, name: str | None, image_size: int) -> Protocol:
    """The protocol `name` of `task` for a network trained at `image_size` pixels.

    None is the default: `native` for networks whose training size is not 224, `dino` otherwise.
    Raises UsageError for an unknown task or name.
    """
    makers: dict[str, dict[str, Callable[[int], dict[str, Any]]]] = {
        "knn": {"dino": _knn_dino, "native": _knn_native},
    }
    if task not in makers:
        raise UsageError(unknown_choice("task", task, makers))
    return choose_protocol(task, name, image_size, makers[task])


def choose_protocol(task: str, name: str | None, image_size: int,
                    makers: Mapping[str, Callable[[int], dict[str, Any]]], usual: str = "dino") -> Protocol:
    """The protocol `name` of `task`, whose settings `makers[name](image_size)` gives.

    None is the default: `native` for networks whose training size is not 224, `usual` otherwise. Raises UsageError
    for an unknown name.
    """
    chosen = name or (usual if image_size == 224 else "native")
    if chosen not in makers:
        raise UsageError(unknown_choice(f"{task} protocol", chosen, makers))
    return Protocol(task, chosen, 1, makers[chosen](image_size))


def knn_protocol(name: str | None, image_size: int) -> Protocol:
    """The k-NN protocol `dino` or `native` (None: the default) for a training size of `image_size` pixels."""
    return resolve("knn", name, image_size)


def native_resize(image_size: int) -> int:
    """Short side in pixels before the center crop: `image_size` x 256/224, below 64 px `image_size` itself.

    >>> [native_resize(size) for size in (28, 64, 96, 224)]
    [28, 73, 110, 256]
    """
    if image_size < 1:
        raise UsageError(f"a training size of {image_size} pixels holds no image")
    return image_size if image_size < 64 else round(image_size * 256 / 224)


def _knn_dino(image_size: int) -> dict[str, Any]:
    """k-NN as facebookresearch/dino's eval_knn.py runs it."""
    return _knn(resize=256, crop=224)


def _knn_native(image_size: int) -> dict[str, Any]:
    """The same vote at the size the network was trained at."""
    return _knn(resize=native_resize(image_size), crop=image_size)


def _knn(resize: int, crop: int) -> dict[str, Any]:
    return {
        "resize": resize,
        "crop": crop,
        "interpolation": "bicubic",
        "feature": "final class token",
        "normalization": "l2",
        "similarity": "cosine",
        "vote": "exp(similarity / temperature)",
        "temperature": 0.07,
        "ks": [10, 20, 100, 200],
        "headline_k": 20,
    }


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
    center = torch.tensor(mean, dtype=torch.float32, device=images.device).view(-1, 1, 1)
    scale = torch.tensor(std, dtype=torch.float32, device=images.device).view(-1, 1, 1)
    return images.to(torch.float32).div_(255).sub_(center).div_(scale)


def transform_image(
    pixels: np.ndarray, settings: Mapping[str, Any], mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """(H, W, 3) uint8 to the (3, crop, crop) float32 that a network with `mean` and `std` gets."""
    return normalize_images(crop_image(pixels, settings), mean, std)
