"""What a run is made of: its images, its engine on a device and its batches, and what is refused before any of it."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from patchssl.backbone import VitBackbone
from patchssl.data import ImageSet, open_images
from patchssl.distributed import local_rank, rank, world_size
from patchssl.errors import UsageError
from patchssl.pretrain.config import Recipe
from patchssl.pretrain.engine import Engine
from patchssl.pretrain.stopping import SIGNALS
from patchssl.pretrain.views import EpochSampler, ViewBatch, ViewDataset, batch_share, collate_views, updates_per_epoch


def training_images(recipe: Recipe, data: str | Path | None, seed: int) -> ImageSet:
    """The images a recipe trains on: the train split (all where nothing is split), or `max_images` drawn from it."""
    if data is None and recipe.data is None:
        raise UsageError("no data was named: give --data FOLDER (or a set's name), or set data in the recipe")
    images = open_images(data or recipe.data or "")
    if recipe.max_images and recipe.max_images < len(images):
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(images))
        images = images.subset(np.sort(order[: recipe.max_images]))
    return images


def make_engine(recipe: Recipe, images: ImageSet, seed: int, device: str | None,
                start: VitBackbone | None = None) -> Engine:
    """An engine before its first update on `device` (default: the first GPU, else the CPU)."""
    steps_per_epoch = updates_per_epoch(len(images), recipe.optim.batch_size)
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    if recipe.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with it only
        torch.use_deterministic_algorithms(True)
    return Engine(recipe, seed, steps_per_epoch, training_device(device), start)


def training_device(device: str | None) -> torch.device:
    """`device`, or a GPU (each launched process its own), or the CPU."""
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return torch.device("cuda", local_rank()) if chosen.type == "cuda" and chosen.index is None else chosen


def require_shares(recipe: Recipe) -> None:
    """UsageError unless the processes there are can share out what `recipe` asks for; costs nothing, so ask first."""
    accumulate, processes = recipe.optim.accumulate, world_size()
    share = batch_share(recipe.optim.batch_size, processes)
    if share % accumulate:
        raise UsageError(f"optim.accumulate = {accumulate} cannot cut the {share} images that each of {processes} "
                         "processes gets into equal parts; choose a divisor")
    if recipe.run.shard and processes > 1 and recipe.run.knn_every_epochs:
        raise UsageError("run.knn_every_epochs needs whole weights, with run.shard = true no process has them; set it "
                         "to 0 and score the finished run")


def make_loader(recipe: Recipe, images: ImageSet, seed: int, num_drop_path: int, *, start_step: int = 0,
                workers: int | None = None) -> Iterable[ViewBatch]:
    """Batches of all epochs from update `start_step` on; what is drawn does not depend on workers."""
    sampler = EpochSampler(len(images), recipe.optim.batch_size, epochs=recipe.optim.epochs, seed=seed,
                           start_step=start_step, rank=rank(), world_size=world_size())
    count = recipe.run.workers if workers is None else workers
    return DataLoader(ViewDataset(images, recipe, seed, num_drop_path), batch_sampler=sampler,
                      collate_fn=collate_views, num_workers=count, pin_memory=torch.cuda.is_available(),
                      worker_init_fn=_quiet_worker, generator=torch.Generator().manual_seed(seed),
                      prefetch_factor=4 if count else None)


def _quiet_worker(_worker: int) -> None:
    """Workers leave signals, often sent to all processes, to the main one, which saves; they use one thread each."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
