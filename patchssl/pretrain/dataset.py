"""Multi-crop views with their geometry, drawn so that any sample of any epoch can be drawn again alone.

Every draw comes from (seed, epoch, index) and the name of what is drawn, never from the state of a rank, a
worker or a step. With `views.shared_in_batch` crops, mirror, color and draws of matches come from (seed, epoch, number
of the batch in the epoch) instead; drop path and masks stay each image's own, no match depends on them. Views stay
uint8 until they are on the training device, where `views.color` colors them.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from patchssl.data.images import ImageSet
from patchssl.data.unreadable import UnreadableBudget
from patchssl.pretrain.config import Recipe
from patchssl.runtime.distributed import rank, world_size
from patchssl.runtime.errors import DataError, UnreadableImage, UsageError
from patchssl.runtime.loader import BatchLoader
from patchssl.runtime.signals import SIGNALS
from patchssl.views.color import ColorDraws, draw_sample_colors, stack_draws
from patchssl.views.crops import cut_views, draw_views, fit_views, sample_rng
from patchssl.views.geometry import patches_per_side
from patchssl.views.masks import draw_masks
from patchssl.views.patchcolor import PatchDraws, draw_patches

Key = tuple[int, int] | tuple[int, int, int]  # epoch, index of an image, and the number in the epoch of its batch


@dataclass(frozen=True, slots=True)
class ViewSample:
    """The G global and L local views of one image; V = G + L, globals first."""

    global_views: Tensor  # (G, 3, S, S) uint8
    local_views: Tensor  # (L, 3, s, s) uint8
    boxes: NDArray[np.float64]  # (V, 4) top, left, height, width in source pixels, or in those of the common square
    mirrored: NDArray[np.bool_]  # (V,)
    index: int  # the image that was read
    global_colors: ColorDraws  # (G, ...)
    local_colors: ColorDraws  # (L, ...)
    global_patches: PatchDraws  # (G, ...); of no views where photometric.patchwise is not layered
    local_patches: PatchDraws  # (L, ...)
    drop_path: NDArray[np.float32]  # (V, places) uniform in [0, 1)
    masks: NDArray[np.bool_]  # (G, N_global), or nothing for a method without
    match_draws: NDArray[np.float32]  # (2, G, V, N) uniform in [0, 1), or nothing where matching needs no draws
    unreadable: tuple[tuple[str, str], ...]  # name and reason of images that it stands in for


@dataclass(frozen=True, slots=True)
class ViewBatch:
    """B samples stacked; draws of color and drop path travel with them."""

    global_views: Tensor  # (B, G, 3, S, S) uint8
    local_views: Tensor  # (B, L, 3, s, s) uint8
    boxes: Tensor  # (B, V, 4) float64
    mirrored: Tensor  # (B, V) bool
    index: Tensor  # (B,) int64
    global_colors: ColorDraws  # (B, G, ...)
    local_colors: ColorDraws  # (B, L, ...)
    global_patches: PatchDraws  # (B, G, ...), or (B, 0, ...)
    local_patches: PatchDraws  # (B, L, ...), or (B, 0, ...)
    drop_path: Tensor  # (B, V, places) float32
    masks: Tensor  # (B, G, N_global) bool: what the student does not see; (B, 0) for a method without masks
    match_draws: Tensor  # (B, 2, G, V, N) float32, see `plan_matches`; (B, 0) where matching needs none
    unreadable: tuple[tuple[str, str], ...]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ViewBatch:
        """The batch with what the networks see on `device`; the rest stays on the CPU, where it is used.

        Geometry, masks and draws of matches are made a plan of, draws of color are read by `apply_colors`. With
        `non_blocking` a pinned batch is copied while the device works.
        """
        return self._map(_SEEN, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ViewBatch:
        """The batch with what `to` copies in page-locked memory."""
        return self._map(_SEEN, Tensor.pin_memory)

    def split(self, parts: int) -> list[ViewBatch]:
        """The batch cut into `parts` of equal size; what was unreadable is named in the first."""
        if parts == 1:
            return [self]
        size = len(self.index) // parts
        return [self._slice(slice(begin, begin + size), () if begin else self.unreadable)
                for begin in range(0, len(self.index), size)]

    def _slice(self, chosen: slice, unreadable: tuple[tuple[str, str], ...]) -> ViewBatch:
        draws: dict[str, Any] = {name: type(drawn)(*(field[chosen] for field in drawn))
                                 for name in _DRAWS for drawn in [getattr(self, name)]}
        return replace(self._map(_TENSORS, lambda tensor: tensor[chosen]), unreadable=unreadable, **draws)

    def _map(self, names: Sequence[str], function: Callable[[Tensor], Tensor]) -> ViewBatch:
        changed: dict[str, Any] = {name: function(getattr(self, name)) for name in names}
        return replace(self, **changed)


_SEEN = ("global_views", "local_views", "drop_path", "masks")  # by the networks
_TENSORS = (*_SEEN, "boxes", "mirrored", "index", "match_draws")
_DRAWS = ("global_colors", "local_colors", "global_patches", "local_patches")
_OF_EACH_IMAGE = ("drop_path", "masks")  # streams that images never share
_Drawn = TypeVar("_Drawn", bound=tuple[Tensor, ...])


class ViewDataset(Dataset[ViewSample]):
    """Views of the images of a set, asked for by (epoch, index) or, as `EpochSampler` does, (epoch, index, batch).

    The batch's number is needed where the images of a batch share their draws, and does not matter otherwise. An
    unreadable image is replaced by the next one that can be read, and named in the sample. Construction raises
    DataError when the first images of the set are unreadable until they are more than run.unreadable_share of all.
    """

    def __init__(self, images: ImageSet, recipe: Recipe, seed: int, num_drop_path: int = 0) -> None:
        """`num_drop_path`: places of drop path in the student, each of which takes a draw per view."""
        self.images, self.recipe, self.seed, self.num_drop_path = images, recipe, seed, num_drop_path
        # here and not in a worker, whose errors arrive with a traceback in their text
        self._readable(0, UnreadableBudget(len(images), recipe.run.unreadable_share))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> ViewSample:
        index, pixels, unreadable = self._readable(key[1])
        config, num_global = self.recipe.views, self.recipe.views.num_global
        views = draw_views(self._rng(key, "crops"), pixels.shape[0], pixels.shape[1], config)
        placed, pixels = fit_views(views, pixels, config)
        drop_path = self._rng(key, "drop_path").random((len(views), self.num_drop_path), dtype=np.float32)
        local_views = (cut_views(pixels, placed[num_global:]) if config.num_local
                       else torch.empty(0, 3, config.local_size, config.local_size, dtype=torch.uint8))
        boxes = np.array([(v.top, v.left, v.height, v.width) for v in views], dtype=np.float64)
        mirrored = np.array([v.mirrored for v in views])
        return ViewSample(cut_views(pixels, placed[:num_global]), local_views, boxes, mirrored, index,
                          *self._colors(key), *self._patch_colors(key), drop_path, self._masks(key),
                          self._match_draws(key), unreadable)

    def _rng(self, key: Key, stream: str) -> np.random.Generator:
        return sample_rng(self.seed, key[0], self._number(key, stream), stream)

    def _number(self, key: Key, stream: str) -> int:
        """Whose draws they are in the epoch: the image's index, or the number of the batch that shares them."""
        if stream in _OF_EACH_IMAGE or not self.recipe.views.shared_in_batch:
            return key[1]
        if len(key) == 2:
            raise ValueError(f"views.shared_in_batch = true, but {key} names no batch; ask for (epoch, index, batch)")
        return key[2]

    def _masks(self, key: Key) -> NDArray[np.bool_]:
        views, masks = self.recipe.views, self.recipe.masks
        if not self.recipe.masked:
            return np.zeros(0, dtype=np.bool_)
        side = patches_per_side(views.global_size, self.recipe.model.patch_size)
        if key[0] < masks.start_epoch:
            return np.zeros((views.num_global, side * side), dtype=np.bool_)
        return draw_masks(self._rng(key, "masks"), views.num_global, side, side, masks)

    def _match_draws(self, key: Key) -> NDArray[np.float32]:
        loss, views = self.recipe.loss, self.recipe.views
        if self.recipe.method != "pwself" or not (loss.matches_per_pair or loss.rule == "random"):
            return np.zeros(0, dtype=np.float32)
        most = max(self._patches(views.global_size), self._patches(views.local_size) if views.num_local else 0)
        return self._rng(key, "matches").random((2, views.num_global, views.num_views, most), dtype=np.float32)

    def _patches(self, size: int) -> int:
        return (size // self.recipe.model.patch_size) ** 2

    def _colors(self, key: Key) -> tuple[ColorDraws, ColorDraws]:
        views = self.recipe.views  # local sizes are whole patches, unless there are no local views
        return draw_sample_colors(self._rng(key, "color"), self.recipe.photometric, views.num_global, views.num_local,
                                  self._patches(views.global_size), self._patches(views.local_size))

    def _patch_colors(self, key: Key) -> tuple[PatchDraws, PatchDraws]:
        views = self.recipe.views
        if self.recipe.patch_color != "layered":
            return (PatchDraws(torch.empty(0, 0, 5), torch.empty(0, 0, dtype=torch.uint8)),) * 2
        return draw_patches(self._rng(key, "patch_color"), self.recipe.photometric, views.num_global, views.num_local,
                            self._patches(views.global_size), self._patches(views.local_size))

    def _readable(self, asked: int, budget: UnreadableBudget | None = None,
                  ) -> tuple[int, NDArray[np.uint8], tuple[tuple[str, str], ...]]:
        """The first readable image from `asked` on: index, pixels, names and reasons of those passed over."""
        passed: list[tuple[str, str]] = []
        for index in itertools.chain(range(asked, len(self)), range(asked)):
            try:
                return index, self.images.pixels(index), tuple(passed)
            except UnreadableImage as error:
                passed.append((error.name, error.reason))
                if budget:
                    budget.add(error.name, error.reason)
        raise DataError(f"none of the {len(self)} images of {self.images.name} can be read")


def collate_views(samples: Sequence[ViewSample], shared: bool = False) -> ViewBatch:
    """Samples of one recipe as a batch; where their draws are `shared`, it holds them once, and says so B times."""
    drawn = samples[:1] if shared else samples
    match_draws = torch.from_numpy(np.stack([sample.match_draws for sample in drawn]))
    return ViewBatch(
        global_views=torch.stack([sample.global_views for sample in samples]),
        local_views=torch.stack([sample.local_views for sample in samples]),
        boxes=torch.from_numpy(np.stack([sample.boxes for sample in samples])),
        mirrored=torch.from_numpy(np.stack([sample.mirrored for sample in samples])),
        index=torch.tensor([sample.index for sample in samples]),
        global_colors=_expand(stack_draws([sample.global_colors for sample in drawn]), len(samples)),
        local_colors=_expand(stack_draws([sample.local_colors for sample in drawn]), len(samples)),
        global_patches=_expand(stack_draws([sample.global_patches for sample in drawn]), len(samples)),
        local_patches=_expand(stack_draws([sample.local_patches for sample in drawn]), len(samples)),
        drop_path=torch.from_numpy(np.stack([sample.drop_path for sample in samples])),
        masks=torch.from_numpy(np.stack([sample.masks for sample in samples])),
        match_draws=match_draws.expand(len(samples), *match_draws.shape[1:]),
        unreadable=tuple(each for sample in samples for each in sample.unreadable))


def _expand(draws: _Drawn, count: int) -> _Drawn:
    """A named tuple of tensors (1, ...) or (count, ...) as (count, ...), without a copy."""
    return type(draws)(*(field.expand(count, *field.shape[1:]) for field in draws))


def batch_share(batch_size: int, processes: int) -> int:
    """Images of a batch that each of `processes` gets; UsageError where they do not all get as many."""
    if batch_size % processes:
        raise UsageError(f"optim.batch_size = {batch_size} cannot be shared out evenly to {processes} processes; "
                         f"choose a multiple of {processes}")
    return batch_size // processes


def updates_per_epoch(num_images: int, batch_size: int) -> int:
    """Whole batches in a set of `num_images`, the rest skipped; UsageError where there is none."""
    if num_images < batch_size:
        raise UsageError(f"optim.batch_size = {batch_size} is more than the {num_images} images of the set; lower it "
                         "or add images")
    return num_images // batch_size


class EpochSampler(Sampler[list[tuple[int, int, int]]]):
    """Batches of (epoch, index, batch) from update `start_step` to the end of the last epoch: one rank's share.

    Each epoch is a shuffle of its own of the whole set, cut into batches of `batch_size` images, the rest
    skipped; `batch` is its number in the epoch. A rank takes its slice of every batch: the number of ranks does not
    change what a batch holds.
    """

    def __init__(self, num_images: int, batch_size: int, *, epochs: int, seed: int, start_step: int = 0,
                 rank: int = 0, world_size: int = 1) -> None:
        self.steps_per_epoch = updates_per_epoch(num_images, batch_size)
        self.share = batch_share(batch_size, world_size)
        self.num_images, self.batch_size, self.epochs, self.seed = num_images, batch_size, epochs, seed
        self.start_step, self.rank = start_step, rank

    def __len__(self) -> int:
        """Updates that are left."""
        return max(0, self.epochs * self.steps_per_epoch - self.start_step)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        first_epoch, first_step = divmod(self.start_step, self.steps_per_epoch)
        for epoch in range(first_epoch, self.epochs):
            order = sample_rng(self.seed, epoch, 0, "shuffle").permutation(self.num_images)
            for step in range(first_step if epoch == first_epoch else 0, self.steps_per_epoch):
                begin = step * self.batch_size + self.rank * self.share
                yield [(epoch, index, step) for index in order[begin:begin + self.share].tolist()]


def make_loader(recipe: Recipe, images: ImageSet, seed: int, num_drop_path: int, *, start_step: int = 0,
                workers: int | None = None) -> Iterable[ViewBatch]:
    """Batches of all epochs from update `start_step` on; what is drawn does not depend on workers."""
    sampler = EpochSampler(len(images), recipe.optim.batch_size, epochs=recipe.optim.epochs, seed=seed,
                           start_step=start_step, rank=rank(), world_size=world_size())
    count = recipe.run.workers if workers is None else workers
    return BatchLoader(ViewDataset(images, recipe, seed, num_drop_path), sampler,
                       partial(collate_views, shared=recipe.views.shared_in_batch), workers=count,
                       pin_memory=torch.cuda.is_available(), worker_init=_quiet_worker,
                       generator=torch.Generator().manual_seed(seed), prefetch=4)


def _quiet_worker(_worker: int) -> None:
    """Workers leave signals, often sent to all processes, to the main one, which saves; they use one thread each."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
