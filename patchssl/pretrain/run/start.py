"""A pretraining run from its first word to its last: begun in a new folder, or resumed in an old one.

A run folder holds `recipe.yaml` (the effective recipe), `run.json` (data, seed, versions, and the recipe the run was
begun with), `log.jsonl` (a row every few seconds) and the checkpoints, see `patchssl.pretrain.run.loop`.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patchssl import __version__
from patchssl.data.images import ImageSet
from patchssl.data.open import absolute_name
from patchssl.models.backbone import VitBackbone
from patchssl.models.checkpoint import load_checkpoint, recover_checkpoint
from patchssl.models.names import absolute_model
from patchssl.pretrain.config import Recipe
from patchssl.pretrain.network import describe_start, starting_backbone
from patchssl.pretrain.recipe import load_recipe
from patchssl.pretrain.run.log import require_tensorboard
from patchssl.pretrain.run.loop import KnnProbe, Run, train
from patchssl.pretrain.run.resume import (
    ALLOW,
    FACTS,
    RECIPE,
    begun_with,
    changed_recipe,
    read_run,
    require_facts,
    require_own_checkpoint,
    restore,
    settle_recipe,
    write_run,
)
from patchssl.pretrain.run.setup import (
    fingerprint_like,
    foreseen,
    known_as,
    make_engine,
    require_shares,
    training_images,
)
from patchssl.runtime.device import training_device
from patchssl.runtime.distributed import joined, locked_by_one, rank, wait_for_all
from patchssl.runtime.errors import Interrupted, UsageError
from patchssl.runtime.progress import RunProgress, Silent
from patchssl.runtime.seeds import require_seed
from patchssl.runtime.signals import Stopped, StopSignals
from patchssl.runtime.text import resume_command

# what makes the k-NN of a run from its recipe, images and seed, or None where there shall be none
KnnMaker = Callable[[Recipe, ImageSet, int], KnnProbe | None]


def pretrain(recipe: Recipe | str | Path, data: str | Path | None = None, out: str | Path | None = None,
             seed: int = 0, *, name: str | None = None, overrides: tuple[str, ...] = (), device: str | None = None,
             progress: RunProgress | None = None, knn: KnnProbe | None = None, make_knn: KnnMaker | None = None,
             stops: StopSignals | None = None) -> Path:
    """Pretrain as `recipe` says and return the run folder.

    `recipe` is a Recipe, the name of a shipped one or a YAML file; `data` a folder or a set's name (default: the
    recipe's); `out` defaults to runs/<recipe>-<seed> and must not hold a checkpoint yet; `name` (default: the run
    folder's) is what records call the network; `knn` scores the teacher in training, `make_knn` makes one of the images
    that are trained on; `stops` are entered already by who listens from earlier on. Raises
    UsageError, DataError, NotFiniteError, CheckpointError, and Interrupted after saving when a signal came.
    """
    seed = require_seed(seed)
    if out == "":
        raise UsageError("out is empty; name the run folder, or say nothing for runs/<recipe>-<seed>")
    folder = Path(out) if out else run_folder(recipe, seed)
    with joined(training_device(device).type), interruptible(folder, stops) as stops, locked_by_one(folder):
        recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
        if data is not None:
            recipe = recipe.model_copy(update={"data": absolute_name(data)})
        require_new(folder)
        _require_means(recipe)
        images = training_images(recipe, data, seed)  # by the name that was given, which errors repeat
        probe = make_knn(recipe, images, seed) if make_knn else knn
        return train(_begin(folder, recipe, images, seed, name, device, progress or Silent(), probe, stops))


def run_folder(recipe: Recipe | str | Path, seed: int) -> Path:
    """Where a run goes that is not told."""
    source = recipe.method if isinstance(recipe, Recipe) else Path(recipe).stem
    return Path("runs") / f"{source}-{seed}"


def require_new(folder: Path) -> None:
    """UsageError for a folder with a run that can be resumed."""
    if any(folder.glob("checkpoint*.pth")):
        raise UsageError(f"{folder} already holds a run; resume it with --resume {folder}, or choose another --out")


def _begin(folder: Path, recipe: Recipe, images: ImageSet, seed: int, name: str | None, device: str | None,
           progress: RunProgress, knn: KnnProbe | None, stops: StopSignals) -> Run:
    """A run before its first update, in a folder that tells how it is made."""
    progress.say(images.describe())
    start = starting_backbone(recipe)
    if start is not None:
        progress.say(describe_start(start, recipe.views.global_size))
    _warn(recipe, images, progress)
    if recipe.optim.accumulate > 1 and recipe.loss.centering == "sinkhorn":
        progress.say(f"loss.centering = sinkhorn balances each of the {recipe.optim.accumulate} parts of a batch "
                     "(optim.accumulate) by itself: smaller parts are balanced more coarsely")
    engine = make_engine(recipe, images, seed, device, start)
    facts = {"data": absolute_name(recipe.data or ""), **known_as(images), "seed": seed, "name": name or folder.name,
             "versions": versions(), "device": str(engine.device), "threads": torch.get_num_threads(),
             "init": start.weights_sha256 if start else None,
             "init_from": absolute_model(recipe.init) if recipe.init else None,
             "pretrain_data": f"{start.pretrain_data or start.name} + {images.name}" if start else images.name}
    with stops.held():
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in (RECIPE, FACTS):  # of a run that ended before its first checkpoint
                (folder / leftover).unlink(missing_ok=True)
            write_run(folder, recipe, facts)
        return Run(folder, recipe, images, facts, engine, progress, stops, knn)


def resume(folder: str | Path, overrides: tuple[str, ...] = (), *, allow_changes: bool = False,
           device: str | None = None, progress: RunProgress | None = None, make_knn: KnnMaker | None = None,
           stops: StopSignals | None = None) -> Path:
    """Resume the run in `folder` from its newest whole checkpoint; a run killed before its first one starts anew.

    On a CPU the weights at the end are those of an uninterrupted run, bit by bit. `overrides` are key=value changes
    of the recipe: those of run.* and data at any time, others with `allow_changes`. Raises as `pretrain` does.
    """
    folder = Path(folder)
    read_run(folder)  # before a lock would make the folder
    with joined(training_device(device).type), interruptible(folder, stops) as stops, locked_by_one(folder):
        return train(_reopen(folder, overrides, allow_changes, device, progress or Silent(), make_knn, stops))


def _reopen(folder: Path, overrides: tuple[str, ...], allow_changes: bool, device: str | None, progress: RunProgress,
            make_knn: KnnMaker | None, stops: StopSignals) -> Run:
    """The run in `folder` where its newest whole checkpoint was saved, all that would spoil it refused by name."""
    _, facts = read_run(folder)
    require_facts(facts, folder)
    checkpoint = _newest_checkpoint(folder)
    recipe, changes = changed_recipe(folder, begun_with(facts, checkpoint), overrides, allow_changes)
    if "data" in changes:
        recipe = recipe.model_copy(update={"data": absolute_name(recipe.data or "")})
    if checkpoint:
        require_own_checkpoint(checkpoint, folder, recipe, facts["seed"])
    _require_means(recipe)
    images, found = _same_images(folder, recipe, facts, moved="data" in changes, allow=allow_changes)
    if other := found != facts["fingerprint"]:
        changes["images"] = facts["fingerprint"], found
        progress.say(f"warning: the images have changed since {folder} began: from here on it is another run than the "
                     f"one that was begun, which {FACTS} notes")
    knn = make_knn(recipe, images, facts["seed"]) if make_knn else None
    start = None if checkpoint else _same_start(folder, recipe, facts)
    engine = make_engine(recipe, images, facts["seed"], device, start)
    _keep_threads(recipe, facts, engine.device, progress)
    if checkpoint:
        restore(engine, checkpoint, folder)
    with stops.held():
        if rank() == 0:
            settle_recipe(folder, recipe, facts, changes, engine.steps_done)
        run = Run(folder, recipe, images, facts, engine, progress, stops, knn)
    if checkpoint:
        run.seconds = checkpoint.get("seconds", 0.0)
        if not other:
            run.budget.bad.update(checkpoint.get("unreadable", {}))
    progress.say(f"resuming {folder} at update {engine.steps_done} of {engine.total_steps}")
    _warn(recipe, images, progress)
    return run


def _warn(recipe: Recipe, images: ImageSet, progress: RunProgress) -> None:
    for sentence in foreseen(recipe, images):
        progress.say(f"warning: {sentence}")


def _require_means(recipe: Recipe) -> None:
    """UsageError unless libraries and processes are there for what `recipe` asks; costs nothing, so ask first."""
    if recipe.run.tensorboard:
        require_tensorboard()
    require_shares(recipe)


def _newest_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint in `folder`; rank 0 puts a damaged one aside before the others look."""
    if not any(folder.glob("checkpoint*.pth")):
        return None
    if rank():
        wait_for_all()
        return load_checkpoint(folder)
    checkpoint = recover_checkpoint(folder)
    wait_for_all()
    return checkpoint


def _same_images(folder: Path, recipe: Recipe, facts: Mapping[str, Any], *, moved: bool,
                 allow: bool) -> tuple[ImageSet, str]:
    """The images that the run in `folder` began with, or UsageError; with `allow` also others. And their fingerprint.
    """
    data = recipe.data if moved else facts["data"]
    images = training_images(recipe, data, facts["seed"])
    if (found := fingerprint_like(facts, images)) != facts["fingerprint"] and not allow:
        raise UsageError(f"{data} has changed since {folder} began (fingerprint {found[:12]}, "
                         f"then {facts['fingerprint'][:12]}); bring the old images back, or give {ALLOW} (for images "
                         "that were repaired or removed), which makes it another run than the one that was begun")
    return images, found


def _same_start(folder: Path, recipe: Recipe, facts: Mapping[str, Any]) -> VitBackbone | None:
    """The weights that the run in `folder` began with, None for random ones, or UsageError."""
    start = starting_backbone(recipe.model_copy(update={"init": facts.get("init_from") or recipe.init}))
    if start is not None and start.weights_sha256 != facts["init"]:
        raise UsageError(f"init = {recipe.init} holds other weights ({start.weights_sha256[:8]}) than when {folder} "
                         f"began ({facts['init'][:8]}); bring those back or start a new run")
    return start


def _keep_threads(recipe: Recipe, facts: Mapping[str, Any], device: torch.device, progress: RunProgress) -> None:
    """On a CPU the last bits of a sum depend on how many threads share it: resume with as many as at first."""
    threads = facts.get("threads", torch.get_num_threads())
    if device.type == "cpu" and not recipe.run.threads and threads != torch.get_num_threads():
        progress.say(f"torch uses {threads} threads, as when the run began, for the same numbers to the last bit; "
                     "run.threads=N changes that")
        torch.set_num_threads(threads)
    if facts["versions"]["torch"] != torch.__version__ or facts["device"] != str(device):
        progress.say(f"the run began with torch {facts['versions']['torch']} on {facts['device']} and resumes with "
                     f"torch {torch.__version__} on {device}: the last bits may differ")


def versions() -> dict[str, str]:
    """Versions of what moves a number."""
    return {"patchssl": __version__, "torch": torch.__version__, "numpy": np.__version__,
            "python": platform.python_version()}


@contextmanager
def interruptible(folder: Path, stops: StopSignals | None = None) -> Iterator[StopSignals]:
    """Listen to signals, if nobody does, and turn one that comes before the first update into Interrupted."""
    try:
        if stops is not None:
            stops.listen()
            yield stops
        else:
            with StopSignals() as stops:
                yield stops
    except Stopped as stop:
        then = f"resume with: {resume_command(folder)}" if (folder / FACTS).exists() else "start it again"
        raise Interrupted(f"stopped by {stop} before the first update, nothing is lost; {then}",
                          stop.exit_code, stop.number) from None
