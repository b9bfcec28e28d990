"""Frozen features: one pass of a network over an image set gives everything that several benchmarks need.

The pass decodes every image once, groups images of one size into batches, and works in blocks: a block that is
done is cached, so that a killed run resumes there, and several processes deal the blocks among themselves.
What cannot be read is collected to the end and then named, all of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

import patchssl
from patchssl.data.images import ImageSet
from patchssl.data.unreadable import raise_unreadable, require_readable
from patchssl.eval.cache import Block, CachedBlocks, FeatureCache
from patchssl.eval.database import require_norms
from patchssl.eval.pooling import compute_outputs, parse_output
from patchssl.eval.protocols import Protocol
from patchssl.eval.transforms import normalize_images
from patchssl.models.backbone import Backbone
from patchssl.models.identity import identify
from patchssl.runtime.console import LOOK
from patchssl.runtime.distributed import all_gather_objects, once_on_each_machine, rank, world_size
from patchssl.runtime.errors import DataError, PatchSSLError, UnreadableImage, UsageError
from patchssl.runtime.loader import BatchLoader
from patchssl.runtime.progress import Progress, shifted

if TYPE_CHECKING:
    from patchssl.eval.tasks import ComputeOptions

Transform = Callable[[np.ndarray], Tensor]  # (H, W, 3) uint8 -> (3, h, w)
BLOCK = 1024  # images that are cached, and dealt to processes, together: what a kill can cost


def extract_features(
    backbone: Backbone,
    images: ImageSet,
    transform: Protocol | Transform,
    *,
    batch_size: int = 64,
    workers: int = 0,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    cache: FeatureCache | None = None,
) -> Tensor:
    """`backbone.features` of all images, (len(images), D) float32 on the CPU; see `extract_outputs`."""
    return extract_outputs(backbone, images, transform, ("features",), batch_size=batch_size, workers=workers,
                           device=device, progress=progress, cache=cache)["features"]


def extract_outputs(
    backbone: Backbone,
    images: ImageSet,
    transform: Protocol | Transform,
    outputs: Sequence[str],
    *,
    scales: Sequence[float] = (1.0,),
    batch_size: int = 64,
    workers: int = 0,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    cache: FeatureCache | None = None,
) -> dict[str, Tensor]:
    """Every one of `outputs` for all images by one pass: (len(images), D) float32 on the CPU, in their order.

    All of `iter_outputs` side by side; arguments and errors as there. Memory: the outputs, what `iter_outputs`
    needs, and the batches that workers hold ready.
    """
    found: Block = {}
    for part, block in iter_outputs(backbone, images, transform, outputs, scales=scales, batch_size=batch_size,
                                    workers=workers, device=device, progress=progress, cache=cache):
        for output, tensor in block.items():
            if output not in found:
                found[output] = torch.empty(len(images), tensor.shape[1])
            found[output][part.start : part.stop] = tensor
    return found


def iter_outputs(
    backbone: Backbone,
    images: ImageSet,
    transform: Protocol | Transform,
    outputs: Sequence[str],
    *,
    scales: Sequence[float] = (1.0,),
    batch_size: int = 64,
    workers: int = 0,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    cache: FeatureCache | None = None,
) -> Iterator[tuple[range, dict[str, Tensor]]]:
    """Block by block and in order, which images they are and every one of `outputs` of them, float32 on the CPU.

    `features` is the network's own vector, `class:4` the class tokens of the last 4 blocks side by side,
    `mean_patch` the mean and `gem:4` the generalized mean (exponent 4) of the final patch tokens. With several
    `scales` an output is the mean over the normalized image resized by each (bilinear, without antialiasing, as
    facebookresearch/dino does).

    A `transform` that gives uint8, as a protocol's does, is followed by the network's mean and std; one that
    gives floats has normalized already. Images of one size share a batch. The network runs where it is, or
    moves to `device`; on a GPU it runs in bfloat16. Of several processes each computes every so many-th block and
    all get all of them. Memory: one block of `BLOCK` images for each process.

    DataError lists every image that cannot be read, at the end of the pass; no block comes after such an image.
    PatchSSLError names images whose outputs are not finite.
    """
    if not len(images):
        raise DataError(f"{images.name} holds no {images.split} images: there is nothing to compute features of")
    if batch_size < 1:
        raise UsageError(f"a batch of {batch_size} images holds none; 1 is the least")
    for output in outputs:
        parse_output(output)
    where = backbone.device if device is None else torch.device(device)
    step = transform.transform() if isinstance(transform, Protocol) else transform
    return _blocks(_Work(backbone, images, step, tuple(outputs), tuple(scales), batch_size, workers, where),
                   cache, progress)


def look_at(backbone: Backbone, sets: Sequence[ImageSet], transform: Protocol | Transform, outputs: Sequence[str],
            compute: ComputeOptions, scales: Sequence[float] = (1.0,)) -> None:
    """`require_readable` of those of `sets` of which a pass, with arguments as of `iter_outputs`, decodes any image."""
    step = transform.transform() if isinstance(transform, Protocol) else transform
    works = [_Work(backbone, images, step, tuple(outputs), tuple(scales), 1, 0, compute.where(backbone))
             for images in sets if len(images)]
    unknown = [work.images for work in works
               if compute.cache is None or not all(map(work.kept(compute.cache).holds, work.parts))]
    require_readable(unknown, compute.workers, compute.counter(LOOK), compute.say)


class _Work(NamedTuple):
    """One pass over an image set."""

    backbone: Backbone
    images: ImageSet
    transform: Transform
    outputs: tuple[str, ...]
    scales: tuple[float, ...]
    batch_size: int
    workers: int
    device: torch.device

    @property
    def parts(self) -> list[range]:
        """The blocks."""
        return [range(start, min(start + BLOCK, len(self.images))) for start in range(0, len(self.images), BLOCK)]

    def kept(self, cache: FeatureCache | None) -> CachedBlocks:
        """Its blocks in the cache."""
        return CachedBlocks(cache, self.facts() if cache is not None else None, self.outputs, self.parts)

    def facts(self) -> dict[str, Any] | None:
        """Everything the outputs depend on, for the cache; None for a transform or network that cannot be told."""
        settings = getattr(self.transform, "settings", None)
        if settings is None or (network := identify(self.backbone)).unknown:
            return None
        self.images.settle(known := once_on_each_machine(lambda: self.images.known))
        order = hashlib.sha256()
        for index in range(len(self.images)):
            order.update(f"{self.images.item_name(index)}\n".encode("utf-8", "surrogateescape"))
        return {"network": network.sha256, "libraries": dict(network.libraries), "arch": self.backbone.arch,
                "transform": settings, "images": known.key, "order": order.hexdigest(),
                "scales": list(self.scales), "device": self.device.type, "torch": torch.__version__,
                "dtype": "bfloat16" if self.device.type == "cuda" else "float32", "patchssl": patchssl.__version__}


def _blocks(work: _Work, cache: FeatureCache | None, progress: Progress | None) -> Iterator[tuple[range, Block]]:
    """Every block in order, from the cache or computed, the network being in evaluation mode meanwhile."""
    total, parts, kept = len(work.images), work.parts, work.kept(cache)
    shared = all_gather_objects([part for part in parts if kept.holds(part)])
    everywhere = set.intersection(*(set(held) for held in shared))
    missing = [part for part in parts if part not in everywhere]
    if progress is not None and len(missing) <= rank():
        progress(total, total)  # nothing for this process to compute
    computed = _computed(work, missing, kept, progress)
    training = work.backbone.training
    work.backbone.to(work.device).eval()
    try:
        for part in parts:
            block = (kept.load(part) or _repaired(work, part, kept)) if part in everywhere else next(computed)
            for features in block.values():
                _require_finite(features, work, part)
            yield part, block
    finally:
        if training:
            work.backbone.train()


def _computed(work: _Work, missing: Sequence[range], kept: CachedBlocks, progress: Progress | None) -> Iterator[Block]:
    """The blocks `missing`, in order and in every process, dealt among the processes a round at a time.

    After an image that cannot be read no block comes, only the error with the list of all, once all are looked at.
    """
    own = missing[rank() :: world_size()]
    windows, total, ready = iter(_loader(work, own)), sum(map(len, own)), 0
    bad: list[UnreadableImage] = []
    for start in range(0, len(missing), world_size()):
        block: Block | None = None
        unreadable: list[UnreadableImage] = []
        for part in missing[start : start + world_size()][rank() : rank() + 1]:  # in the last round perhaps none
            shown = None if progress is None else shifted(progress, ready, total)
            block, unreadable = _one_block(work, windows, len(part), shown, skip=bool(bad))
            ready += len(part)
            if block is not None and not (bad or unreadable):
                kept.store(part, block)
        found = all_gather_objects((block, unreadable))
        bad += [error for _, errors in found for error in errors]
        if not bad:
            yield from (each for each, _ in found if each is not None)
    raise_unreadable(sorted(bad, key=lambda error: error.name), len(work.images))


def _repaired(work: _Work, part: range, kept: CachedBlocks) -> Block:
    """A block that is damaged in the cache, computed again by this process alone."""
    block, bad = _one_block(work, iter(_loader(work, [part])), len(part), None, skip=False)
    raise_unreadable(bad, len(work.images))
    kept.store(part, block)
    return block


def _one_block(work: _Work, loader: Iterator[_Window], count: int, progress: Progress | None,
               skip: bool) -> tuple[Block, list[UnreadableImage]]:
    """Outputs of the next `count` images and those that cannot be read; past one, images are only decoded."""
    block: Block = {}
    bad: list[UnreadableImage] = []
    done = 0
    while done < count:
        window = next(loader)
        bad += [UnreadableImage(name, reason) for name, reason in window.bad]
        for places, batch in window.groups if not (bad or skip) else ():
            for output, part in _forward(work, batch).items():
                if output not in block:
                    block[output] = torch.empty(count, part.shape[1])
                block[output][torch.tensor(places) + done] = part
        done += window.size
        if progress is not None:
            progress(done, count)
    return block, bad


class _Window(NamedTuple):
    """Consecutive images: their places among them and pixels by size, and what cannot be read."""

    size: int
    groups: list[tuple[list[int], Tensor]]
    bad: list[tuple[str, str]]  # name and reason


class _TransformedImages(Dataset[Any]):
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


def _collate(items: Sequence[Tensor | tuple[str, str]]) -> _Window:
    by_size: dict[tuple[int, ...], list[int]] = {}
    for place, item in enumerate(items):
        if isinstance(item, Tensor):
            by_size.setdefault(tuple(item.shape), []).append(place)
    groups = [(places, torch.stack([items[place] for place in places])) for places in by_size.values()]  # type: ignore[misc]
    return _Window(len(items), groups, [item for item in items if not isinstance(item, Tensor)])


def _loader(work: _Work, parts: Sequence[range]) -> BatchLoader:
    """Windows of at most a batch of the images in `parts`, none of them across the end of a part."""
    windows = [list(part[at : at + work.batch_size]) for part in parts for at in range(0, len(part), work.batch_size)]
    return BatchLoader(_TransformedImages(work.images, work.transform), windows, _collate,
                       workers=min(work.workers, len(windows)), pin_memory=work.device.type == "cuda")


@torch.inference_mode()
def _forward(work: _Work, images: Tensor) -> Block:
    """Every output (B, D) of a batch, float32 on the CPU, averaged over the scales."""
    net = work.backbone
    images = images.to(work.device, non_blocking=True)
    if images.dtype == torch.uint8:
        images = normalize_images(images, net.mean, net.std)
    sums: Block = {}
    for scale in work.scales:
        scaled = images if scale == 1 else F.interpolate(images, scale_factor=scale, mode="bilinear")
        with torch.autocast(work.device.type, torch.bfloat16, enabled=work.device.type == "cuda"):
            found = compute_outputs(net, scaled, work.outputs)
        sums = {output: sums.get(output, 0) + part.float() for output, part in found.items()}
    for output, part in sums.items():
        if part.ndim != 2 or len(part) != len(images):
            raise PatchSSLError(
                f"{net.name} gave {output} of shape {tuple(part.shape)} for {len(images)} images; one "
                "vector per image is needed"
            )
    return {output: (part / len(work.scales)).cpu() for output, part in sums.items()}


def _require_finite(features: Tensor, work: _Work, part: range) -> None:
    bad = (~torch.isfinite(features).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        named = ", ".join(work.images.item_name(part[at]) for at in bad[:5]) + (", ..." if len(bad) > 5 else "")
        raise PatchSSLError(
            f"the features that {work.backbone.name} gives for {len(bad):,} of {len(part):,} images hold NaN or "
            f"infinity ({named}): its weights are damaged, its training diverged, or they overflow in half precision"
        )
    require_norms(features, f"features that {work.backbone.name} gives")
