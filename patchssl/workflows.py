"""What joins pretraining, evaluation and report: the functions behind the command line.

This is the composition root: nothing below it knows both pretraining and evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from patchssl.backbone import Backbone, VitBackbone
from patchssl.console import LOOK, Console
from patchssl.data import open_pair
from patchssl.errors import UsageError
from patchssl.eval.cache import FeatureCache
from patchssl.eval.features import extract_features
from patchssl.eval.knn import evaluate_knn, evaluate_pixels, knn_accuracy
from patchssl.eval.protocols import knn_protocol
from patchssl.eval.results import Result
from patchssl.loading import load_backbone
from patchssl.pretrain.config import Recipe
from patchssl.pretrain.loop import KnnProbe
from patchssl.pretrain.making import training_images
from patchssl.pretrain.plan import RunEstimate, plan_run
from patchssl.pretrain.recipefile import load_recipe
from patchssl.pretrain.resuming import changed_recipe, read_run
from patchssl.pretrain.run import interruptible, pretrain, require_new, resume, run_folder
from patchssl.pretrain.stopping import StopSignals

if TYPE_CHECKING:
    from patchssl.export import ExportReport

PIXELS = "pixels"
PROBE_QUERIES, PROBE_BANK = 1000, 5000


def score_knn(model: str | Backbone, data: str, protocol: str | None = None, *, device: str | None = None,
              batch_size: int = 64, workers: int = 2, console: Console | None = None,
              cache: FeatureCache | None = None, **variant: Any) -> Result:
    """k-NN of the backbone `model`, or of raw pixels (`pixels`, `pixels?img_size=32`), on train and val of `data`.

    `variant` are the shots, draws, seed, index, search_params and gpus of `evaluate_knn`.
    """
    chosen = default_device(device)
    of_pixels = is_pixels(model)
    if of_pixels and protocol not in (None, "native"):
        raise UsageError(f"raw pixels are scored under the protocol native, not {protocol}")
    image_size = pixels_size(str(model)) if of_pixels else None
    say = console.say if console else (lambda sentence: None)
    backbone = open_model(model, chosen, say) if isinstance(model, str) and not of_pixels else model
    train, val = open_pair(data)
    say(train.describe())
    say(val.describe())
    progress, look = (console.counter("features"), console.counter(LOOK)) if console else (None, None)
    if isinstance(backbone, str):
        return evaluate_pixels(train, val, image_size, progress=progress, check_progress=look, **variant)
    return evaluate_knn(backbone, train, val, protocol, batch_size=batch_size, workers=workers, progress=progress,
                        check_progress=look, search_progress=console.counter("search") if console else None,
                        cache=cache, **variant)


def open_model(model: str, device: torch.device, say: Callable[[str], None]) -> Backbone:
    """`load_backbone`, saying what was decided on the way and how images will be normalized."""
    backbone = load_backbone(model, device)
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (backbone.mean, backbone.std))
    for note in (*backbone.notes, f"images are normalized by mean {mean} and std {std}"):
        say(f"{backbone.name}: {note}")
    return backbone


def export_and_push(model: str, to: Path, formats: tuple[str, ...], *, license_name: str | None, results: Path,
                    overwrite: bool, push: str | None, private: bool, console: Console) -> ExportReport:
    """Export `model` to the folder `to` and, where `push` names a repository of the hub, upload the folder."""
    from patchssl.export import export_model, push_model

    report = export_model(model, to, formats=formats, license=license_name, results=results, overwrite=overwrite,
                          progress=console.counter("export"))
    if push is not None:
        console.say(f"uploading {to} to {push}")
        console.say(f"uploaded to {push_model(to, push, private=private)}")
    return report


def is_pixels(model: str | Backbone) -> bool:
    """Does `model` mean raw pixels: `pixels`, or `pixels?img_size=32`?"""
    return isinstance(model, str) and model.partition("?")[0] == PIXELS


def pixels_size(model: str) -> int | None:
    """The 32 of `pixels?img_size=32`; None for `pixels`."""
    if model == PIXELS:
        return None
    option, _, value = model.partition("?")[2].partition("=")
    if option != "img_size" or not value.isdecimal() or not int(value):
        raise UsageError(f"model '{model}' is not understood; write pixels, or with a size pixels?img_size=32")
    return int(value)


def default_device(device: str | None) -> torch.device:
    """`device`, or the first GPU, or the CPU; UsageError for a device that is not there."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device} cannot be used ({str(error).splitlines()[0]}); 'patchssl doctor' lists "
                         "what is there") from None
    return chosen


def pretrain_with_probe(recipe: str | Recipe, data: str | None, out: Path | None, seed: int,
                        overrides: tuple[str, ...] = (), *, device: str | None, console: Console,
                        name: str | None = None, stops: StopSignals | None = None) -> Path:
    """`pretrain` with an in-training k-NN where the recipe asks for one."""
    effective = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    folder = out or run_folder(recipe, seed)
    require_new(folder)
    chosen = str(default_device(device))
    with interruptible(folder, stops) as stops:
        probe = make_probe(effective, data, seed)
        return pretrain(effective, data, folder, seed, name=name, device=chosen, progress=console, knn=probe,
                        stops=stops)


def resume_with_probe(folder: Path, overrides: tuple[str, ...] = (), *, allow_changes: bool = False,
                      device: str | None, console: Console, stops: StopSignals | None = None) -> Path:
    """`resume` with the in-training k-NN the run had."""
    chosen = str(default_device(device))
    with interruptible(folder, stops) as stops:
        _, facts = read_run(folder)
        recipe, changes = changed_recipe(folder, facts.get("recipe", {}), overrides, allow_changes)
        data = recipe.data if "data" in changes else facts["data"]
        return resume(folder, overrides, allow_changes=allow_changes, device=chosen, progress=console,
                      knn=make_probe(recipe, data, facts["seed"]), stops=stops)


def make_probe(recipe: Recipe, data: str | None, seed: int) -> KnnProbe | None:
    """20-NN top-1 of a backbone on images held out of the train split; None where the recipe wants none.

    A seeded choice of at most 1,000 labeled training images is classified by at most 5,000 others; the test split
    is not looked at.
    """
    if not recipe.run.knn_every_epochs:
        return None
    images = training_images(recipe, data, seed)
    if images.labels is None:
        return None
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(images))
    queries = images.subset(order[: min(PROBE_QUERIES, len(images) // 5)])
    bank = images.subset(order[len(queries) : len(queries) + PROBE_BANK])

    def probe(backbone: VitBackbone) -> float:
        protocol = knn_protocol("native", backbone.image_size)
        features = [extract_features(backbone, part, protocol, workers=0) for part in (bank, queries)]
        labels = [part.require_labels() for part in (bank, queries)]
        return knn_accuracy(features[0], labels[0], features[1], labels[1], num_neighbors=20)["top1"]

    return probe


def run_facts(folder: Path) -> tuple[Recipe, str, int]:
    """Recipe, data and seed of the run in `folder`."""
    recipe, facts = read_run(folder)
    return recipe, facts["data"], facts["seed"]


def plan_pretraining(recipe: str, data: str | None, seed: int, overrides: tuple[str, ...], *,
                     device: str | None) -> RunEstimate:
    """What a run would cost; see `patchssl.pretrain.plan.plan_run`."""
    return plan_run(load_recipe(recipe, overrides), data, seed, str(default_device(device)))
