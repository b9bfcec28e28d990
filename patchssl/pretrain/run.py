"""A pretraining run: data, loop, log, checkpoints and signals around the engine.

A run folder holds `recipe.yaml` (the effective recipe), `run.json` (data, seed, versions, and the recipe the run was
begun with), `log.jsonl` (a row every few seconds) and the checkpoints. `checkpoint.pth` has the keys of
`Engine.state_dict` and `network`, `origin`, `recipe`, `seconds`, `unreadable`.
"""

from __future__ import annotations

import math
import os
import platform
import resource
import signal
import sys
import time
import traceback
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
from patchssl.checkpoint import load_checkpoint, recover_checkpoint, save_checkpoint
from patchssl.data import ImageSet, UnreadableBudget, lasting_name, open_images
from patchssl.distributed import all_gather_objects, joined, local_rank, rank, wait_for_all, world_size
from patchssl.errors import CheckpointError, Interrupted, NotFiniteError, PatchSSLError, UsageError
from patchssl.pretrain.board import require_tensorboard
from patchssl.pretrain.config import Recipe, dump_recipe, load_recipe
from patchssl.pretrain.engine import Engine, StepReport, network_spec
from patchssl.pretrain.health import collapse_warnings
from patchssl.pretrain.logbook import Logbook
from patchssl.pretrain.meeting import Agreed, Meetings, Said
from patchssl.pretrain.resuming import (
    FACTS,
    RECIPE,
    begun_with,
    changed_recipe,
    read_run,
    require_own_checkpoint,
    restore,
    settle_recipe,
    write_run,
)
from patchssl.pretrain.start import describe_start, starting_backbone
from patchssl.pretrain.stopping import SIGNALS, Stopped, StopSignals, signals_kept_from_children
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
    """One run under way; of several processes rank 0 writes it down."""

    folder: Path
    recipe: Recipe
    images: ImageSet
    facts: Mapping[str, Any]  # what run.json says: seed, name of the network, ...
    engine: Engine
    progress: Progress
    stops: StopSignals
    knn: KnnProbe | None = None
    seconds: float = 0.0  # spent training, k-NN left out, earlier parts of a resumed run included
    report: StepReport | None = None  # of the newest update
    pending: dict[str, Any] | None = None  # a row that waits for its k-NN
    budget: UnreadableBudget = field(init=False)
    book: Logbook | None = None  # of rank 0
    meetings: Meetings = field(init=False)
    saved_step: int = field(init=False)
    best_rank: float = 0.0  # highest effective rank of a row, for who watches it fall

    def __post_init__(self) -> None:
        self.budget = UnreadableBudget(len(self.images))
        self.saved_step = self.engine.steps_done
        self.meetings = Meetings(self.recipe.run.log_seconds)
        self.stops.together = world_size() > 1
        if rank() == 0:
            self.book = Logbook(self.folder, self.engine.steps_done, tensorboard=self.recipe.run.tensorboard)
        else:
            self.progress = Silent()


def pretrain(recipe: Recipe | str | Path, data: str | Path | None = None, out: str | Path | None = None,
             seed: int = 0, *, name: str | None = None, overrides: tuple[str, ...] = (), device: str | None = None,
             progress: Progress | None = None, knn: KnnProbe | None = None, stops: StopSignals | None = None) -> Path:
    """Pretrain as `recipe` says and return the run folder.

    `recipe` is a Recipe, the name of a shipped one or a YAML file; `data` a folder or a set's name (default: the
    recipe's); `out` defaults to runs/<recipe>-<seed> and must not hold a checkpoint yet; `name` (default: the run
    folder's) is what records call the network; `stops` are entered already by who listens from earlier on. Raises
    UsageError, DataError, NotFiniteError, CheckpointError, and Interrupted after saving when a signal came.
    """
    folder = Path(out) if out else run_folder(recipe, seed)
    with joined(training_device(device).type), interruptible(folder, stops) as stops:
        recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
        if data is not None:
            recipe = recipe.model_copy(update={"data": lasting_name(data)})
        require_new(folder)
        return _train(_begin(folder, recipe, seed, name, device, progress or Silent(), knn, stops))


def run_folder(recipe: Recipe | str | Path, seed: int) -> Path:
    """Where a run goes that is not told."""
    source = recipe.method if isinstance(recipe, Recipe) else Path(recipe).stem
    return Path("runs") / f"{source}-{seed}"


def require_new(folder: Path) -> None:
    """UsageError for a folder with a run that can be resumed."""
    if any(folder.glob("checkpoint*.pth")):
        raise UsageError(f"{folder} already holds a run; go on with --resume {folder}, or choose another --out")


def _begin(folder: Path, recipe: Recipe, seed: int, name: str | None, device: str | None, progress: Progress,
           knn: KnnProbe | None, stops: StopSignals) -> Run:
    """A run before its first update, in a folder that tells how it is made."""
    if recipe.run.tensorboard:
        require_tensorboard()
    images = training_images(recipe, None, seed)
    progress.say(images.describe())
    start = starting_backbone(recipe)
    if start is not None:
        progress.say(describe_start(start, recipe.views.global_size))
    engine = make_engine(recipe, images, seed, device, start)
    facts = {"data": lasting_name(recipe.data or ""), "dataset": images.name,
             "fingerprint": images.fingerprint, "seed": seed, "name": name or folder.name, "versions": versions(),
             "device": str(engine.device), "threads": torch.get_num_threads(),
             "init": start.weights_sha256 if start else None,
             "pretrain_data": f"{start.pretrain_data or start.name} + {images.name}" if start else images.name}
    with stops.held():
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in (RECIPE, FACTS):  # of a run that ended before its first checkpoint
                (folder / leftover).unlink(missing_ok=True)
            write_run(folder, recipe, facts)
        return Run(folder, recipe, images, facts, engine, progress, stops, knn)


def resume(folder: str | Path, overrides: tuple[str, ...] = (), *, allow_changes: bool = False,
           device: str | None = None, progress: Progress | None = None, knn: KnnProbe | None = None,
           stops: StopSignals | None = None) -> Path:
    """Go on with the run in `folder` from its newest whole checkpoint; a run killed before its first one starts anew.

    On a CPU the weights at the end are those of an uninterrupted run, bit by bit. `overrides` are key=value changes
    of the recipe: those of run.* and data at any time, others with `allow_changes`. Raises as `pretrain` does.
    """
    folder = Path(folder)
    with joined(training_device(device).type), interruptible(folder, stops) as stops:
        return _train(_reopen(folder, overrides, allow_changes, device, progress or Silent(), knn, stops))


def _reopen(folder: Path, overrides: tuple[str, ...], allow_changes: bool, device: str | None, progress: Progress,
            knn: KnnProbe | None, stops: StopSignals) -> Run:
    """The run in `folder` where its newest whole checkpoint was saved, all that would spoil it refused by name."""
    _, facts = read_run(folder)
    checkpoint = _newest_checkpoint(folder)
    recipe, changes = changed_recipe(folder, begun_with(facts, checkpoint), overrides, allow_changes)
    if "data" in changes:
        recipe = recipe.model_copy(update={"data": lasting_name(recipe.data or "")})
    if checkpoint:
        require_own_checkpoint(checkpoint, folder, recipe, facts["seed"])
    if recipe.run.tensorboard:
        require_tensorboard()
    images = _same_images(folder, recipe, facts, moved="data" in changes)
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
        run.seconds = checkpoint["seconds"]
        run.budget.bad.update(checkpoint.get("unreadable", {}))
    progress.say(f"going on with {folder} at update {engine.steps_done} of {engine.total_steps}")
    return run


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


def _same_images(folder: Path, recipe: Recipe, facts: Mapping[str, Any], *, moved: bool) -> ImageSet:
    """The images that the run in `folder` began with, or UsageError."""
    data = recipe.data if moved else facts["data"]
    images = training_images(recipe, data, facts["seed"])
    if images.fingerprint != facts["fingerprint"]:
        raise UsageError(f"{data} has changed since {folder} began (fingerprint {images.fingerprint[:12]}, "
                         f"then {facts['fingerprint'][:12]}); bring the old images back or start a new run")
    return images


def _same_start(folder: Path, recipe: Recipe, facts: Mapping[str, Any]) -> VitBackbone | None:
    """The weights that the run in `folder` began with, None for random ones, or UsageError."""
    start = starting_backbone(recipe)
    if start is not None and start.weights_sha256 != facts["init"]:
        raise UsageError(f"init = {recipe.init} holds other weights ({start.weights_sha256[:8]}) than when {folder} "
                         f"began ({facts['init'][:8]}); bring those back or start a new run")
    return start


def _keep_threads(recipe: Recipe, facts: Mapping[str, Any], device: torch.device, progress: Progress) -> None:
    """On a CPU the last bits of a sum depend on how many threads share it: go on with as many as at first."""
    threads = facts.get("threads", torch.get_num_threads())
    if device.type == "cpu" and not recipe.run.threads and threads != torch.get_num_threads():
        progress.say(f"torch uses {threads} threads, as when the run began, for the same numbers to the last bit; "
                     "run.threads=N changes that")
        torch.set_num_threads(threads)
    if facts["versions"]["torch"] != torch.__version__ or facts["device"] != str(device):
        progress.say(f"the run began with torch {facts['versions']['torch']} on {facts['device']} and goes on with "
                     f"torch {torch.__version__} on {device}: the last bits may differ")


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
    if len(images) < recipe.optim.batch_size:
        raise UsageError(f"optim.batch_size = {recipe.optim.batch_size} is more than the {len(images)} images of "
                         f"{images.name}; lower it")
    _require_shares(recipe)
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    if recipe.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with it only
        torch.use_deterministic_algorithms(True)
    return Engine(recipe, seed, len(images) // recipe.optim.batch_size, training_device(device), start)


def training_device(device: str | None) -> torch.device:
    """`device`, or a GPU (each launched process its own), or the CPU."""
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return torch.device("cuda", local_rank()) if chosen.type == "cuda" and chosen.index is None else chosen


def _require_shares(recipe: Recipe) -> None:
    """UsageError unless every process gets as much of a batch, in as many equal parts as are accumulated."""
    optim, processes = recipe.optim, world_size()
    if optim.batch_size % processes:
        raise UsageError(f"optim.batch_size = {optim.batch_size} cannot be shared out evenly to {processes} processes; "
                         f"choose a multiple of {processes}")
    if optim.batch_size // processes % optim.accumulate:
        raise UsageError(f"optim.accumulate = {optim.accumulate} cannot cut the {optim.batch_size // processes} images "
                         f"that each of {processes} processes gets into equal parts; choose a divisor")
    if recipe.run.shard and recipe.optim.precision == "fp16":
        raise UsageError("run.shard = true cannot scale the loss of optim.precision = fp16; choose bf16 or fp32")
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


def versions() -> dict[str, str]:
    """Versions of what moves a number."""
    return {"patchssl": __version__, "torch": torch.__version__, "numpy": np.__version__,
            "python": platform.python_version()}


@contextmanager
def interruptible(folder: Path, stops: StopSignals | None = None) -> Iterator[StopSignals]:
    """Listen to signals, if nobody does, and turn one that comes before the first update into Interrupted."""
    try:
        if stops is not None:
            yield stops
        else:
            with StopSignals() as stops:
                yield stops
    except Stopped as stop:
        go_on = f"go on with: patchssl pretrain --resume {folder}" if (folder / FACTS).exists() else "start it again"
        raise Interrupted(f"stopped by {stop} before the first update, nothing is lost; {go_on}",
                          stop.exit_code, stop.number) from None


def _train(run: Run) -> Path:
    """All updates that are left, whatever stops them: a signal is obeyed after saving."""
    try:
        _catch_up_knn(run)
        with _loader_let_go():
            _make_updates(run)
        with run.stops.held():
            _save(run)
            _close(run)
    except Stopped as stop:
        raise _interrupted(run, stop) from None
    except (RuntimeError, ConnectionError, EOFError, CheckpointError) as error:
        if (lost := _lost_reader(error)) is None:
            raise
        # the update at hand may be half done: it is not saved
        raise PatchSSLError(f"a process that reads images ended unexpectedly, often for want of memory ({lost}); with "
                            "fewer run.workers, go on from the last checkpoint with: "
                            f"patchssl pretrain --resume {run.folder}") from error
    run.progress.say(f"pretraining done in {run.seconds:.0f} s, saved in {run.folder}")
    return run.folder


def _lost_reader(error: BaseException | None) -> BaseException | None:
    """What says that a process that reads images is gone: torch's word breaks in anywhere, even while saving."""
    while error is not None:
        cut_off = isinstance(error, ConnectionError | EOFError) and "in DataLoader worker" not in str(error)
        if cut_off or "DataLoader worker (pid" in str(error):
            return error
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def _loader_let_go() -> Iterator[None]:
    """An error's frames keep the loader, and its processes, which the end of this one would wait for, for ever."""
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise


def _interrupted(run: Run, stop: Stopped) -> Interrupted:
    """Save what is done; no signal is obeyed any more, but for a second one of the same kind."""
    done, go_on = run.engine.steps_done, f"go on with: patchssl pretrain --resume {run.folder}"
    if run.pending:
        _write_row(run, run.pending)  # without its k-NN, which the resumed run begins with
    if done:
        _save(run)
    _close(run)
    where = f"at update {done} of {run.engine.total_steps}, saved" if done else "before the first update"
    return Interrupted(f"stopped by {stop} {where}; {go_on}", stop.exit_code, stop.number)


def _make_updates(run: Run) -> None:
    """Make every update that is left, log and save when it is time.

    A signal is obeyed between two updates, while this process reads images, or in the midst of a k-NN; by several
    processes when they meet.
    """
    engine, recipe = run.engine, run.recipe
    loader = make_loader(recipe, run.images, run.facts["seed"], engine.num_drop_path, start_step=engine.steps_done)
    clock = Clock(run.seconds, engine.steps_done)
    with run.stops.held(), signals_kept_from_children():
        batches = iter(loader)
    while (batch := _next_batch(run, batches)) is not None:
        with run.stops.held():
            run.meetings.unreadable |= dict.fromkeys(batch.unreadable, "")
            run.report = engine.train_step(batch)
            run.seconds = clock.seconds()
            last = engine.steps_done == engine.total_steps
            if engine.device.type == "cpu" or last:
                _require_finite(run)
            agreed = _meet(run, clock) if last or _knn_due(run) or run.meetings.due(engine.steps_done) else None
            if agreed and (last or agreed.log_due or _knn_due(run)):
                run.pending = _row(run, clock.images_per_second(engine.steps_done, recipe.optim.batch_size))
        if run.pending:
            if _knn_due(run):
                with clock.stopped():
                    run.pending["knn_top1"] = run.knn(engine.teacher.backbone)  # type: ignore[misc]
            with run.stops.held():
                _write_row(run, run.pending)
            clock.logged(engine.steps_done)
        if agreed and agreed.signal is not None and run.stops.together:
            raise Stopped(agreed.signal)
        if agreed and agreed.save_due:
            with run.stops.held():
                _save(run)
            clock.saved()


def _next_batch(run: Run, batches: Iterator[ViewBatch]) -> ViewBatch | None:
    """The next batch, None after the last.

    Processes that read images talk to this one through locks, which a signal must not leave taken: it is obeyed when
    the batch is there.
    """
    if not run.recipe.run.workers:
        return next(batches, None)
    with run.stops.held():
        return next(batches, None)


def _meet(run: Run, clock: Clock) -> Agreed:
    """What the processes of the run agree on after the newest update."""
    times, step = run.recipe.run, run.engine.steps_done
    said = Said(run.stops.received, run.meetings.unreadable, log_due=clock.since_log() >= times.log_seconds,
                save_due=clock.since_save() >= 60 * times.checkpoint_minutes,
                seconds_per_step=clock.seconds_per_step(step))
    agreed = run.meetings.hold(step, said)
    for name, reason in agreed.unreadable.items():
        run.budget.add(name, reason)
    return agreed


class Clock:
    """Times of a run's loop in seconds; `before` were spent in earlier parts of the run."""

    def __init__(self, before: float, steps_done: int) -> None:
        self._began = self._logged = self._saved = time.perf_counter()
        self._before, self._logged_step, self._first_step = before, steps_done, steps_done

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Time that is not the training's."""
        stopped = time.perf_counter()
        yield
        self._began += time.perf_counter() - stopped

    def seconds(self) -> float:
        """Spent training, earlier parts included."""
        return self._before + time.perf_counter() - self._began

    def seconds_per_step(self, steps_done: int) -> float:
        """Mean over this part of the run."""
        return (time.perf_counter() - self._began) / max(1, steps_done - self._first_step)

    def since_log(self) -> float:
        """Since the last row."""
        return time.perf_counter() - self._logged

    def since_save(self) -> float:
        """Since the last checkpoint."""
        return time.perf_counter() - self._saved

    def images_per_second(self, steps_done: int, batch_size: int) -> float:
        """Since the last row."""
        return (steps_done - self._logged_step) * batch_size / max(1e-9, self.since_log())

    def logged(self, steps_done: int) -> None:
        """A row was written."""
        self._logged, self._logged_step = time.perf_counter(), steps_done

    def saved(self) -> None:
        """A checkpoint was written."""
        self._saved = time.perf_counter()


def _knn_due(run: Run) -> bool:
    """Is a k-NN due after the newest update: every so many epochs, and at the end?"""
    every, engine = run.recipe.run.knn_every_epochs, run.engine
    if not run.knn:
        return False
    return engine.steps_done == engine.total_steps or bool(
        every and engine.steps_done % (every * engine.steps_per_epoch) == 0)


def _catch_up_knn(run: Run) -> None:
    """The k-NN that a signal, or nobody there to ask for it, kept the last row from."""
    last = all_gather_objects(run.book and run.book.last)[0]
    if last and last["step"] == run.engine.steps_done and "knn_top1" not in last and _knn_due(run):
        top1 = run.knn(run.engine.teacher.backbone)  # type: ignore[misc]
        with run.stops.held():
            if run.book:
                run.progress.update(run.engine.steps_done, run.engine.total_steps,
                                    run.book.complete_last("knn_top1", top1))


def _row(run: Run, images_per_second: float) -> dict[str, Any]:
    """The log row of the newest update."""
    assert run.report is not None
    _require_finite(run)
    engine = run.engine
    return {"step": engine.steps_done, "epoch": engine.steps_done / engine.steps_per_epoch,
            "seconds": round(run.seconds, 3), **run.report.row(), "images_per_second": images_per_second,
            "memory_bytes": peak_memory(engine.device), "unreadable_images": run.budget.count}


def _write_row(run: Run, row: dict[str, Any]) -> None:
    run.pending = None
    if run.book is None:
        return
    run.book.append(row)
    run.progress.update(run.engine.steps_done, run.engine.total_steps, row)
    if row["epoch"] > run.recipe.optim.warmup_epochs:
        images = run.recipe.optim.batch_size // world_size() // run.recipe.optim.accumulate
        for warning in collapse_warnings(row, run.recipe.head.num_prototypes,
                                         num_tokens=images * run.recipe.views.num_global,
                                         best_rank=run.best_rank):
            run.progress.say(f"warning: at update {run.engine.steps_done} {warning}")
        run.best_rank = max(run.best_rank, row["effective_rank"])


def _close(run: Run) -> None:
    if run.book:
        run.book.close()


def _require_finite(run: Run) -> None:
    assert run.report is not None
    loss, grad_norm = float(run.report.losses.total), float(run.report.grad_norm)
    overflow = run.engine.scaler.is_enabled()  # of fp16: that update is left out, and the scale lowered
    if not (math.isfinite(loss) and (overflow or math.isfinite(grad_norm))):
        raise NotFiniteError(f"the loss is {loss}, its gradient's norm {grad_norm} at update {run.engine.steps_done}; "
                             f"the last good checkpoint in {run.folder} is untouched; try a lower optim.lr")


def _save(run: Run) -> None:
    """Save what is new since the last checkpoint."""
    if run.saved_step == run.engine.steps_done:
        return
    _require_finite(run)
    origin = Origin(name=run.facts["name"], method=run.recipe.method,
                    pretrain_data=run.facts.get("pretrain_data", run.images.name),
                    pretrain_epochs=run.engine.steps_done / run.engine.steps_per_epoch, seed=run.facts["seed"])
    state = run.engine.state_dict()  # of sharded weights all processes gather it
    run.saved_step = run.engine.steps_done
    if rank():
        return
    save_checkpoint(run.folder, {**state, "network": asdict(network_spec(run.recipe)),
                                 "origin": asdict(origin), "recipe": dump_recipe(run.recipe),
                                 "seconds": run.seconds, "unreadable": dict(run.budget.bad)})


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
