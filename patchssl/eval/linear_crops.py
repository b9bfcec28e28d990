"""Random crops of labeled images in an order of their own, for the linear probe that is trained as DINO trains it.

The order comes from (seed, epoch) as torch's DistributedSampler draws it, the crop of an image from (seed, epoch,
index): neither the number of workers nor that of processes changes a crop or its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from patchssl.backbone import Backbone
from patchssl.data import ImageSet
from patchssl.distributed import rank, world_size
from patchssl.errors import UnreadableImage


class ProbeTraining(NamedTuple):
    """What a probe is trained on, and how; `settings` are those of the protocol."""

    backbone: Backbone
    images: ImageSet
    labels: Tensor  # (N,)
    num_classes: int
    settings: Mapping[str, Any]
    seed: int = 0
    device: torch.device = torch.device("cpu")
    batch_size: int = 64  # images per forward pass; a step's batch is the protocol's
    workers: int = 0


class LabeledBatch(NamedTuple):
    """One step's batch: which images, and the crops that this process computes."""

    indices: list[int]  # of the whole batch
    chunks: list[Tensor]  # every world-size-th chunk: (b, 3, S, S) uint8
    bad: list[tuple[str, str]]  # name and reason of what cannot be read


def dino_batches(training: ProbeTraining, epochs: range) -> Iterator[LabeledBatch]:
    """The batches of all steps of `epochs`, in chunks of `batch_size` that processes deal among themselves."""
    keys = (chunk for epoch, indices in _steps(training, epochs) for chunk in _own_chunks(training, epoch, indices))
    # its own generator: every iterator draws from one, and what runs beside this must not notice
    loader = iter(DataLoader(RandomCrops(training.images, training.settings, training.seed), batch_sampler=keys,
                             num_workers=training.workers, collate_fn=_collate, generator=torch.Generator(),
                             pin_memory=training.device.type == "cuda"))
    for epoch, indices in _steps(training, epochs):
        found = [next(loader) for _ in _own_chunks(training, epoch, indices)]
        yield LabeledBatch(indices, [pixels for pixels, _ in found], [name for _, bad in found for name in bad])


def _steps(training: ProbeTraining, epochs: range) -> Iterator[tuple[int, list[int]]]:
    """The epoch and the indices of every batch, ordered as torch's DistributedSampler orders one process's images."""
    for epoch in epochs:
        generator = torch.Generator().manual_seed(training.seed + epoch)
        for batch in torch.randperm(len(training.images), generator=generator).split(training.settings["batch"]):
            yield epoch, batch.tolist()


def _own_chunks(training: ProbeTraining, epoch: int, indices: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Keys (epoch, index) of the chunks of a batch that this process computes."""
    size = training.batch_size
    chunks = [indices[at : at + size] for at in range(0, len(indices), size)]
    return [[(epoch, index) for index in chunk] for chunk in chunks[rank() :: world_size()]]


class RandomCrops(Dataset[Any]):
    """Crops (3, S, S) uint8 by (epoch, index): torchvision's RandomResizedCrop and RandomHorizontalFlip of PIL images.

    An unreadable image is its (name, reason), so that workers can send it.
    """

    def __init__(self, images: ImageSet, settings: Mapping[str, Any], seed: int) -> None:
        self._images, self._seed = images, seed
        self._draw = transforms.Compose([
            transforms.RandomResizedCrop(settings["train_crop"], tuple(settings["train_scale"]),
                                         tuple(settings["train_aspect"]),
                                         transforms.InterpolationMode(settings["train_interpolation"])),
            transforms.RandomHorizontalFlip(settings["train_mirror"])])

    def __getitem__(self, key: tuple[int, int]) -> Tensor | tuple[str, str]:
        epoch, index = key
        try:
            image = Image.fromarray(self._images.pixels(index))
        except UnreadableImage as error:
            return error.name, error.reason
        state = np.random.SeedSequence([self._seed, epoch, index]).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(state[0]))
            drawn = np.array(self._draw(image))
        return torch.from_numpy(drawn).permute(2, 0, 1).contiguous()


def _collate(items: Sequence[Tensor | tuple[str, str]]) -> tuple[Tensor, list[tuple[str, str]]]:
    crops = [item for item in items if isinstance(item, Tensor)]
    pixels = torch.stack(crops) if crops else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    return pixels, [item for item in items if not isinstance(item, Tensor)]
