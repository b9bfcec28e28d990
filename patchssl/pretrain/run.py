"""A pretraining run: data, loop, log, checkpoints and signals around the engine.

A run folder holds `recipe.yaml` (the effective recipe), `run.json` (data, seed, versions), `log.jsonl` (a row every
few seconds) and the checkpoints. `checkpoint.pth` has the keys of `Engine.state_dict` and `network`, `origin`.
"""

from __future__ import annotations

import json
import math
import platform
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader

from patchssl import __version__
from patchssl.backbone import Origin, VitBackbone
from patchssl.checkpoint import load_checkpoint, save_checkpoint
from patchssl.data import NAMED_SETS, ImageSet, UnreadableBudget, open_images
from patchssl.errors import Interrupted, NotFiniteError, UsageError
from patchssl.pretrain.config import Recipe, dump_recipe, load_recipe, parse_recipe
from patchssl.pretrain.engine import Engine, StepReport, network_spec
from patchssl.pretrain.health import collapse_warnings
from patchssl.pretrain.start import describe_start, starting_backbone
from patchssl.pretrain.views import EpochSampler, ViewBatch, ViewDataset, collate_views

KnnProbe = Callable[[VitBackbone], float]  # top-1 accuracy in [0, 1] of a backbone, handed in by a workflow


class Progress(Protocol):
    """What a run tells while it works; the command line draws it, a test listens."""

    def update(self, done: int, total: int, row: dict[str, Any]) -> None:
        """`done` of `total` updates are made, `row` is the newest log row (empty at first)."""

    def say(self, sentence: str) -> None:
        """A sentence for the user: what was understood, what was saved, a warning."""


class Silent:
    """Progress that nobody watches."""

    def update(self, done: int, total: int, row: dict[str, Any]) -> None:
        """Ignored."""

    def say(self, sentence: str) -> None:
        """Ignored."""


@dataclass
class Run:
    """One run under way."""

    folder: Path
    recipe: Recipe
    images: ImageSet
    facts: Mapping[str, Any]  # what run.json says: seed, name of the network, ...
    engine: Engine
    progress: Progress
    knn: KnnProbe | None = None
    stop_signal: int | None = None
    seconds: float = 0.0  # spent in the loop, earlier parts of a resumed run included
    budget: UnreadableBudget = field(init=False)

    def __post_init__(self) -> None:
        self.budget = UnreadableBudget(len(self.images))


def pretrain(recipe: Recipe | str | Path, data: str | Path | None = None, out: str | Path | None = None,
             seed: int = 0, *, name: str | None = None, overrides: tuple[str, ...] = (), device: str | None = None,
             progress: Progress | None = None, knn: KnnProbe | None = None) -> Path:
    """Pretrain as `recipe` says and return the run folder.

    `recipe` is a Recipe, the name of a shipped one or a YAML file; `data` a folder or a set's name (default: the
    recipe's); `out` defaults to runs/<recipe>-<seed> and must not hold a checkpoint yet; `name` (default: the run
    folder's) is what records call the network. Raises UsageError, DataError, NotFiniteError, and Interrupted after
    saving when a signal came.
    """
    source = recipe.method if isinstance(recipe, Recipe) else Path(recipe).stem
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    if data is not None:
        recipe = recipe.model_copy(update={"data": _lasting_name(data)})
    folder = Path(out) if out else Path("runs") / f"{source}-{seed}"
    if any(folder.glob("checkpoint*.pth")):
        raise UsageError(f"{folder} already holds a run; go on with --resume {folder}, or choose another --out")
    progress = progress or Silent()
    images = training_images(recipe, None, seed)
    progress.say(images.describe())
    start = starting_backbone(recipe)
    if start is not None:
        progress.say(describe_start(start, recipe.views.global_size))
    engine = make_engine(recipe, images, seed, device, start)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").unlink(missing_ok=True)  # of a run that ended before its first checkpoint
    facts = {"data": _lasting_name(recipe.data or ""), "dataset": images.name,
             "fingerprint": images.fingerprint, "seed": seed, "name": name or folder.name, "versions": versions(),
             "device": str(engine.device), "init": start.weights_sha256 if start else None,
             "pretrain_data": f"{start.pretrain_data or start.name} + {images.name}" if start else images.name}
    (folder / "run.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    return _train(Run(folder, recipe, images, facts, engine, progress, knn))


def resume(folder: str | Path, *, device: str | None = None, progress: Progress | None = None,
           knn: KnnProbe | None = None) -> Path:
    """Go on with the run in `folder` from its newest whole checkpoint; a run killed before its first one starts anew.

    On a CPU the weights at the end are those of an uninterrupted run, bit by bit.
    """
    folder, progress = Path(folder), progress or Silent()
    recipe, facts = read_run(folder)
    images = training_images(recipe, facts["data"], facts["seed"])
    if images.fingerprint != facts["fingerprint"]:
        raise UsageError(f"{facts['data']} has changed since {folder} began (fingerprint {images.fingerprint[:12]}, "
                         f"then {facts['fingerprint'][:12]}); bring the old images back or start a new run")
    saved = any(folder.glob("checkpoint*.pth"))
    start = None if saved else starting_backbone(recipe)
    if start is not None and start.weights_sha256 != facts["init"]:
        raise UsageError(f"init = {recipe.init} holds other weights ({start.weights_sha256[:8]}) than when {folder} "
                         f"began ({facts['init'][:8]}); bring those back or start a new run")
    engine = make_engine(recipe, images, facts["seed"], device, start)
    run = Run(folder, recipe, images, facts, engine, progress, knn)
    if saved:
        checkpoint = load_checkpoint(folder)
        engine.load_state_dict(checkpoint)
        run.seconds = checkpoint["seconds"]
    _cut_log(folder / "log.jsonl", engine.steps_done)
    progress.say(f"going on with {folder} at update {engine.steps_done} of {engine.total_steps}")
    return _train(run)


def read_run(folder: Path) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of the run in `folder`, and what its run.json says: data, fingerprint, seed, name, versions."""
    if not (folder / "recipe.yaml").is_file() or not (folder / "run.json").is_file():
        raise UsageError(f"{folder} is not a run folder: it has no recipe.yaml and run.json")
    recipe = parse_recipe((folder / "recipe.yaml").read_text(), where=str(folder / "recipe.yaml"))
    return recipe, json.loads((folder / "run.json").read_text())


def training_images(recipe: Recipe, data: str | Path | None, seed: int) -> ImageSet:
    """The images a recipe trains on: the train split (all where nothing is split), or `max_images` drawn from it."""
    if data is None and recipe.data is None:
        raise UsageError("no data was named: give --data FOLDER (or a set's name), or set data in the recipe")
    images = open_images(data or recipe.data or "")
    if recipe.max_images and recipe.max_images < len(images):
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(images))
        images = images.subset(np.sort(order[: recipe.max_images]))
    return images


def _lasting_name(data: str | Path) -> str:
    """What names `data` from any folder: a set's name as it is, a path in full."""
    named_set = isinstance(data, str) and data in NAMED_SETS
    return str(data) if named_set else str(Path(data).expanduser().absolute())


def make_engine(recipe: Recipe, images: ImageSet, seed: int, device: str | None,
                start: VitBackbone | None = None) -> Engine:
    """An engine before its first update on `device` (default: the first GPU, else the CPU)."""
    if len(images) < recipe.optim.batch_size:
        raise UsageError(f"optim.batch_size = {recipe.optim.batch_size} is more than the {len(images)} images of "
                         f"{images.name}; lower it")
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Engine(recipe, seed, len(images) // recipe.optim.batch_size, chosen, start)


def make_loader(recipe: Recipe, images: ImageSet, seed: int, num_drop_path: int, *, start_step: int = 0,
                workers: int | None = None) -> Iterable[ViewBatch]:
    """Batches of all epochs from update `start_step` on; what is drawn does not depend on workers."""
    sampler = EpochSampler(len(images), recipe.optim.batch_size, epochs=recipe.optim.epochs, seed=seed,
                           start_step=start_step)
    count = recipe.run.workers if workers is None else workers
    return DataLoader(ViewDataset(images, recipe, seed, num_drop_path), batch_sampler=sampler,
                      collate_fn=collate_views, num_workers=count, pin_memory=torch.cuda.is_available(),
                      worker_init_fn=_quiet_worker, generator=torch.Generator().manual_seed(seed),
                      prefetch_factor=4 if count else None)


def versions() -> dict[str, str]:
    """Versions of what moves a number."""
    return {"patchssl": __version__, "torch": torch.__version__, "numpy": np.__version__,
            "python": platform.python_version()}


def _train(run: Run) -> Path:
    with _listening(run):
        report = None
        for report in _updates(run):
            if run.stop_signal is not None:
                _save(run, report)
                raise Interrupted(f"stopped by {signal.Signals(run.stop_signal).name} at update "
                                  f"{run.engine.steps_done} of {run.engine.total_steps}, saved; go on with: "
                                  f"patchssl pretrain --resume {run.folder}",
                                  130 if run.stop_signal == signal.SIGINT else 75)
        if report is not None:
            _save(run, report)
    run.progress.say(f"pretraining done in {run.seconds:.0f} s, saved in {run.folder}")
    return run.folder


def _updates(run: Run) -> Iterator[StepReport]:
    """Make every update that is left, log and save when it is time, and hand out each report."""
    engine, recipe = run.engine, run.recipe
    loader = make_loader(recipe, run.images, run.facts["seed"], engine.num_drop_path, start_step=engine.steps_done)
    began, before = time.perf_counter(), run.seconds
    logged = saved = began
    logged_step = engine.steps_done
    for batch in loader:
        for name in batch.unreadable:
            run.budget.add(name)
        report = engine.train_step(batch)
        now = time.perf_counter()
        run.seconds = before + now - began
        last = engine.steps_done == engine.total_steps
        if engine.device.type == "cpu" or last:
            _require_finite(report, run)
        if last or now - logged >= recipe.run.log_seconds or _probe_due(run):
            images = (engine.steps_done - logged_step) * recipe.optim.batch_size
            _log(run, report, images_per_second=images / max(1e-9, now - logged))
            logged, logged_step = time.perf_counter(), engine.steps_done
        if now - saved >= 60 * recipe.run.checkpoint_minutes:
            _save(run, report)
            saved = time.perf_counter()
        yield report


def _probe_due(run: Run) -> bool:
    every, engine = run.recipe.run.knn_every_epochs, run.engine
    return bool(run.knn and every) and engine.steps_done % (every * engine.steps_per_epoch) == 0


def _log(run: Run, report: StepReport, images_per_second: float) -> None:
    _require_finite(report, run)
    engine = run.engine
    row: dict[str, Any] = {"step": engine.steps_done, "epoch": engine.steps_done / engine.steps_per_epoch,
                           "seconds": round(run.seconds, 3), **report.row(),
                           "images_per_second": images_per_second, "memory_bytes": peak_memory(engine.device),
                           "unreadable_images": run.budget.count}
    if run.knn and (_probe_due(run) or engine.steps_done == engine.total_steps):
        row["knn_top1"] = run.knn(engine.teacher.backbone)
    with (run.folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    run.progress.update(engine.steps_done, engine.total_steps, row)
    if row["epoch"] > run.recipe.optim.warmup_epochs:
        for warning in collapse_warnings(row, run.recipe.head.num_prototypes):
            run.progress.say(f"warning: at update {engine.steps_done} {warning}")


def _require_finite(report: StepReport, run: Run) -> None:
    loss, grad_norm = float(report.losses.total), float(report.grad_norm)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NotFiniteError(f"the loss is {loss}, its gradient's norm {grad_norm} at update {run.engine.steps_done}; "
                             f"the last good checkpoint in {run.folder} is untouched; try a lower optim.lr")


def _save(run: Run, report: StepReport) -> None:
    _require_finite(report, run)
    origin = Origin(name=run.facts["name"], method=run.recipe.method,
                    pretrain_data=run.facts.get("pretrain_data", run.images.name),
                    pretrain_epochs=run.engine.steps_done / run.engine.steps_per_epoch, seed=run.facts["seed"])
    save_checkpoint(run.folder, {**run.engine.state_dict(), "network": asdict(network_spec(run.recipe)),
                                 "origin": asdict(origin), "recipe": dump_recipe(run.recipe),
                                 "seconds": run.seconds})


def _cut_log(path: Path, steps_done: int) -> None:
    """Drop the rows after the checkpoint that a resumed run starts from: it writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= steps_done:
                kept.append(line)
        except (ValueError, KeyError):  # the line a kill cut short
            continue
    partial = path.with_suffix(".partial")
    partial.write_text("".join(f"{line}\n" for line in kept))
    partial.replace(path)


@contextmanager
def _listening(run: Run) -> Iterator[None]:
    """Note SIGINT, SIGTERM and SIGUSR1 in `run.stop_signal`; a second one of the kind acts as it always did."""
    before: dict[int, Any] = {}

    def note(number: int, _frame: object) -> None:
        run.stop_signal = number
        signal.signal(number, before[number])

    try:
        for chosen in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            before[chosen] = signal.signal(chosen, note)
    except ValueError:  # not the main thread: signals are somebody else's
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _quiet_worker(_worker: int) -> None:
    """Workers leave signals, often sent to all processes, to the main one, which saves; they use one thread each."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
