"""What joins pretraining, evaluation and report: the functions behind the command line.

This is the composition root: nothing below it knows both pretraining and evaluation.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

import numpy as np

from patchssl.data.images import ImageSet
from patchssl.eval.features import extract_features
from patchssl.eval.knn import knn_accuracy
from patchssl.eval.protocols import knn_protocol
from patchssl.models.backbone import VitBackbone
from patchssl.pretrain.config import Recipe
from patchssl.pretrain.recipe import load_recipe
from patchssl.pretrain.run.estimate import RunEstimate, plan_run
from patchssl.pretrain.run.loop import KnnProbe
from patchssl.pretrain.run.resume import read_run
from patchssl.pretrain.run.start import pretrain, resume
from patchssl.runtime.console import Console
from patchssl.runtime.device import default_device
from patchssl.runtime.distributed import rank
from patchssl.runtime.errors import DataError, UnreadableImage
from patchssl.runtime.signals import StopSignals

PROBE_QUERIES, PROBE_BANK = 1000, 5000

log = logging.getLogger(__name__)


def pretrain_with_probe(recipe: str | Recipe, data: str | None, out: Path | None, seed: int,
                        overrides: tuple[str, ...] = (), *, device: str | None, console: Console,
                        name: str | None = None, stops: StopSignals | None = None) -> Path:
    """`pretrain` with an in-training k-NN where the recipe asks for one."""
    return pretrain(recipe, data, out, seed, name=name, overrides=overrides, device=str(default_device(device)),
                    progress=console, make_knn=make_probe, stops=stops)


def resume_with_probe(folder: Path, overrides: tuple[str, ...] = (), *, allow_changes: bool = False,
                      device: str | None, console: Console, stops: StopSignals | None = None) -> Path:
    """`resume` with the in-training k-NN the run had."""
    return resume(folder, overrides, allow_changes=allow_changes, device=str(default_device(device)), progress=console,
                  make_knn=make_probe, stops=stops)


def make_probe(recipe: Recipe, images: ImageSet, seed: int) -> KnnProbe | None:
    """20-NN top-1 of a backbone on some of a run's `images`; None where the recipe wants none, or they have no labels.

    A seeded choice of at most 1,000 labeled training images is classified by at most 5,000 others. The run trains on
    both: what it shows is whether training moves on, not a held-out score. The test split is not looked at. Images that
    cannot be read are left out, as in training, and that is said once.
    """
    if not recipe.run.knn_every_epochs or images.labels is None:
        return None
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(images))
    queries = images.subset(order[: min(PROBE_QUERIES, len(images) // 5)])
    bank = images.subset(order[len(queries) : len(queries) + PROBE_BANK])
    parts = [bank, queries]

    def probe(backbone: VitBackbone) -> float:
        protocol = knn_protocol("native", backbone.image_size)
        features = []
        for number, part in enumerate(parts):
            try:
                features.append(extract_features(backbone, part, protocol, workers=0))
            except DataError:
                parts[number] = _readable_part(part)
                features.append(extract_features(backbone, parts[number], protocol, workers=0))
        labels = [part.require_labels() for part in parts]
        return knn_accuracy(features[0], labels[0], features[1], labels[1], num_neighbors=20)["top1"]

    return probe


def _readable_part(images: ImageSet) -> ImageSet:
    """The images that can be decoded; how many those are not is said."""
    kept = []
    for index in range(len(images)):
        with suppress(UnreadableImage):
            images.pixels(index)
            kept.append(index)
    if rank() == 0:
        log.warning("the k-NN in training leaves out %s of %s images, which cannot be read", len(images) - len(kept),
                    len(images))
    return images.subset(kept)


def run_facts(folder: Path) -> tuple[Recipe, str, int]:
    """Recipe, data and seed of the run in `folder`."""
    recipe, facts = read_run(folder)
    return recipe, facts["data"], facts["seed"]


def plan_pretraining(recipe: str, data: str | None, seed: int, overrides: tuple[str, ...], *,
                     device: str | None) -> RunEstimate:
    """What a run would cost; see `patchssl.pretrain.run.estimate.plan_run`."""
    return plan_run(load_recipe(recipe, overrides), data, seed, str(default_device(device)))
