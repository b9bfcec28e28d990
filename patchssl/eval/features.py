"""Frozen features: one pass of a network over an image set, in order, in bounded memory.

The pass decodes every image once. What cannot be read is collected to the end and then named, all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from patchssl.backbone import Backbone, Origin
from patchssl.data import ImageSet, raise_unreadable
from patchssl.errors import DataError, PatchSSLError, UnreadableImage, UsageError
from patchssl.eval.protocols import Protocol, knn_protocol, normalize_images

Progress = Callable[[int, int], None]  # images done, images in all
Transform = Callable[[np.ndarray], Tensor]  # (H, W, 3) uint8 -> (3, h, w), of one size within a batch


class RawPixels(Backbone):
    """The images themselves as features, (B, 3 * size * size) in [0, 1]: what a network has to beat."""

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


def extract_features(
    backbone: Backbone,
    images: ImageSet,
    transform: Protocol | Transform,
    *,
    batch_size: int = 64,
    workers: int = 0,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Features (len(images), D) float32 on the CPU, in the order of `images`.

    A `transform` that gives uint8, as a protocol's does, is followed by the network's mean and std; one that
    gives floats has normalized already. The network runs where it is, or moves to `device`; on a GPU it runs
    in bfloat16. DataError lists every image that cannot be read; PatchSSLError names images whose features
    are not finite.
    """
    if not len(images):
        raise DataError(f"{images.name} holds no {images.split} images: there is nothing to compute features of")
    if batch_size < 1:
        raise UsageError(f"a batch of {batch_size} images holds none; 1 is the least")
    where = backbone.device if device is None else torch.device(device)
    crops = _Crops(images, transform.transform() if isinstance(transform, Protocol) else transform)
    loader = _loader(crops, batch_size, workers, pin=where.type == "cuda")
    training = backbone.training
    backbone.to(where).eval()
    try:
        features, bad = _pass(backbone, loader, len(images), where, progress)
    finally:
        if training:
            backbone.train()
    raise_unreadable(bad, len(images))
    _require_finite(features, images, backbone.name)
    return features


def pixel_features(images: ImageSet, size: int) -> Tensor:
    """Raw pixels (len(images), 3 * size * size) in [0, 1], cut as the `native` protocol does."""
    return extract_features(RawPixels(size), images, knn_protocol("native", size))


def describe_device(device: torch.device) -> str:
    """Where and how a network ran, for the record: what may move the last digit of a number."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, bfloat16 autocast"
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' * (threads != 1)}"


def _pass(
    backbone: Backbone, loader: Iterable[_Batch], total: int, device: torch.device, progress: Progress | None
) -> tuple[Tensor, list[UnreadableImage]]:
    """Features (total, D) and the images that cannot be read; past one of those, images are only decoded."""
    features, done = torch.empty(0, 0), 0
    bad: list[UnreadableImage] = []
    for batch in loader:
        bad += [UnreadableImage(name, reason) for name, reason in batch.bad]
        if batch.images is not None and not bad:
            part = _forward(backbone, batch.images, device)
            if not done:
                features = torch.empty(total, part.shape[1])
            features[done : done + len(part)] = part
        done += batch.size
        if progress is not None:
            progress(done, total)
    return features, bad


class _Batch(NamedTuple):
    size: int
    images: Tensor | None  # (size, 3, h, w); None when one of them is bad
    bad: list[tuple[str, str]]  # name and reason


class _Crops(Dataset[Any]):
    """Transformed images by index; an unreadable one is its (name, reason), so that workers can send it."""

    def __init__(self, images: ImageSet, transform: Transform) -> None:
        self._images, self._transform = images, transform

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor | tuple[str, str]:
        try:
            pixels = self._images.pixels(index)
        except UnreadableImage as error:
            return error.name, error.reason
        return self._transform(pixels)


def _collate(items: Sequence[Tensor | tuple[str, str]]) -> _Batch:
    bad = [item for item in items if not isinstance(item, Tensor)]
    good = [item for item in items if isinstance(item, Tensor)]
    return _Batch(len(items), None if bad else torch.stack(good), bad)


def _loader(crops: _Crops, batch_size: int, workers: int, pin: bool) -> DataLoader[Any]:
    # its own generator: every iterator draws from one, and training beside this must not notice
    return DataLoader(
        crops,
        batch_size=batch_size,
        num_workers=min(workers, -(-len(crops) // batch_size)),
        collate_fn=_collate,
        pin_memory=pin,
        generator=torch.Generator(),
    )


@torch.inference_mode()
def _forward(backbone: Backbone, images: Tensor, device: torch.device) -> Tensor:
    """(B, D) float32 on the CPU."""
    images = images.to(device, non_blocking=True)
    if images.dtype == torch.uint8:
        images = normalize_images(images, backbone.mean, backbone.std)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        features = backbone.features(images)
    if features.ndim != 2 or len(features) != len(images):
        raise PatchSSLError(
            f"{backbone.name} gave features of shape {tuple(features.shape)} for {len(images)} images; one "
            "vector per image is needed"
        )
    return features.float().cpu()


def _require_finite(features: Tensor, images: ImageSet, name: str) -> None:
    bad = (~torch.isfinite(features).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        named = ", ".join(images.item_name(index) for index in bad[:5]) + (", ..." if len(bad) > 5 else "")
        raise PatchSSLError(
            f"the features that {name} gives for {len(bad):,} of {len(images):,} images hold NaN or infinity "
            f"({named}): its weights are damaged or its training diverged"
        )
