"""What a run is made of: its images, its engine on a device and its batches, and what is refused before any of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patchssl import __version__
from patchssl.data.fingerprints import VERSION
from patchssl.data.images import ImageSet
from patchssl.data.open import open_images
from patchssl.models.backbone import VitBackbone
from patchssl.pretrain.config import Recipe
from patchssl.pretrain.dataset import batch_share, updates_per_epoch
from patchssl.pretrain.engine import Engine
from patchssl.pretrain.schedules import unfinished
from patchssl.runtime.device import training_device
from patchssl.runtime.distributed import first_on_each_machine, once_on_each_machine, world_size
from patchssl.runtime.errors import UsageError


def training_images(recipe: Recipe, data: str | Path | None, seed: int) -> ImageSet:
    """The images a recipe trains on: the train split (all where nothing is split), or `max_images` drawn from it."""
    if data is None and recipe.data is None:
        raise UsageError("no data was named: give --data FOLDER (or a set's name), or set data in the recipe")
    images = first_on_each_machine(lambda: open_images(data or recipe.data or ""))
    if recipe.max_images and recipe.max_images < len(images):
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(images))
        images = images.subset(np.sort(order[: recipe.max_images]))
    return images


def known_as(images: ImageSet) -> dict[str, Any]:
    """What a run's facts say of the images it is trained on."""
    images.settle(once_on_each_machine(lambda: images.known))
    return {"dataset": images.name, "fingerprint": images.fingerprint, "fingerprint_version": VERSION,
            "fingerprint_covers": images.known.content}


def fingerprint_like(facts: Mapping[str, Any], images: ImageSet) -> str:
    """The fingerprint of `images` by the formula of the one in `facts`, which an older version may have written."""
    version = facts.get("fingerprint_version", 1)
    if version not in (1, VERSION):
        raise UsageError(f"the run's images are known by a fingerprint of version {version}, of a newer patchssl; "
                         f"resume it with that (this is {__version__})")
    return once_on_each_machine(lambda: images.fingerprint if version == VERSION else images.first_fingerprint)


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


def foreseen(recipe: Recipe, images: ImageSet) -> tuple[str, ...]:
    """What a run on `images` will not do although `recipe` speaks of it, a sentence each; nothing of it is an error."""
    every = recipe.run.knn_every_epochs
    unmeasured = [f"run.knn_every_epochs = {every}, but {images.name} has no labels: no k-NN is measured while it "
                  "trains; give images in class folders, or run.knn_every_epochs=0"]
    return (*unfinished(recipe), *(unmeasured if every and images.labels is None else ()))


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
