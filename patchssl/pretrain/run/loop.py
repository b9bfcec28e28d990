"""The loop of a run: update after update, log, k-NN, checkpoints, and what stops it.

`checkpoint.pth` has the keys of `Engine.state_dict` and `network`, `origin`, `recipe`, `seconds`, `unreadable`.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from patchssl.data.images import ImageSet
from patchssl.data.unreadable import UnreadableBudget
from patchssl.models.backbone import Origin, VitBackbone
from patchssl.models.checkpoint import save_checkpoint
from patchssl.pretrain.config import Recipe
from patchssl.pretrain.dataset import ViewBatch, make_loader
from patchssl.pretrain.engine import Engine, StepReport
from patchssl.pretrain.health import collapse_warnings
from patchssl.pretrain.network import network_spec
from patchssl.pretrain.recipe import dump_recipe
from patchssl.pretrain.run.log import MetricLog
from patchssl.pretrain.run.sync import Decision, LocalStatus, RankSync
from patchssl.runtime.device import peak_memory
from patchssl.runtime.distributed import all_gather_objects, rank, world_size
from patchssl.runtime.errors import CheckpointError, Interrupted, NotFiniteError, PatchSSLError
from patchssl.runtime.loader import lost_worker
from patchssl.runtime.progress import RunProgress, Silent
from patchssl.runtime.signals import Stopped, StopSignals, ignore_sigchld, signals_kept_from_children
from patchssl.runtime.text import resume_command

KnnProbe = Callable[[VitBackbone], float]  # top-1 accuracy in [0, 1] of a backbone, handed in by a workflow


@dataclass
class Run:
    """One run under way; of several processes rank 0 writes it down."""

    folder: Path
    recipe: Recipe
    images: ImageSet
    facts: Mapping[str, Any]  # what run.json says: seed, name of the network, ...
    engine: Engine
    progress: RunProgress
    stops: StopSignals
    knn: KnnProbe | None = None
    seconds: float = 0.0  # spent training, k-NN left out, earlier parts of a resumed run included
    report: StepReport | None = None  # of the newest update
    pending: dict[str, Any] | None = None  # a row that waits for its k-NN
    budget: UnreadableBudget = field(init=False)
    book: MetricLog | None = None  # of rank 0
    meetings: RankSync = field(init=False)
    saved_step: int = field(init=False)
    best_rank: float = 0.0  # highest effective rank of a row, for who watches it fall
    warned: frozenset[str] = frozenset()  # of what the newest row gave cause to

    def __post_init__(self) -> None:
        self.budget = UnreadableBudget(len(self.images))
        self.saved_step = self.engine.steps_done
        self.meetings = RankSync(self.recipe.run.log_seconds)
        self.stops.together = world_size() > 1
        if rank() == 0:
            self.book = MetricLog(self.folder, self.engine.steps_done, tensorboard=self.recipe.run.tensorboard)
        else:
            self.progress = Silent()


def train(run: Run) -> Path:
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
        if (lost := lost_worker(error)) is None:
            raise
        # the update at hand may be half done: it is not saved
        raise PatchSSLError(f"a process that reads images ended unexpectedly, often for want of memory ({lost}); with "
                            "fewer run.workers, resume from the last checkpoint with: "
                            f"{resume_command(run.folder)}") from error
    run.progress.say(f"pretraining done in {run.seconds:.0f} s, saved in {run.folder}")
    return run.folder


@contextmanager
def _loader_let_go() -> Iterator[None]:
    """An error's frames keep the loader, and its processes, which the end of this one would wait for, for ever."""
    try:
        yield
    except BaseException as error:
        with ignore_sigchld():  # the loader ends its processes, of which one may have ended before
            traceback.clear_frames(error.__traceback__)
        raise


def _interrupted(run: Run, stop: Stopped) -> Interrupted:
    """Save what is done; no signal is obeyed any more, but for a second one of the same kind."""
    done, then = run.engine.steps_done, f"resume with: {resume_command(run.folder)}"
    if run.pending:
        _write_row(run, run.pending)  # without its k-NN, which the resumed run begins with
    if done:
        _save(run)
    _close(run)
    where = f"at update {done} of {run.engine.total_steps}, saved" if done else "before the first update"
    return Interrupted(f"stopped by {stop} {where}; {then}", stop.exit_code, stop.number)


def _make_updates(run: Run) -> None:
    """Make every update that is left, log and save when it is time.

    A signal is obeyed between two updates, while this process reads images, or in the midst of a k-NN; by several
    processes when they meet.
    """
    engine, recipe = run.engine, run.recipe
    loader = make_loader(recipe, run.images, run.facts["seed"], engine.num_drop_path, start_step=engine.steps_done)
    clock = Clock(run.seconds, engine.steps_done)
    if recipe.run.compile:
        run.progress.say("run.compile = true: the first updates wait for the compiler, on a CPU for minutes")
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


def _meet(run: Run, clock: Clock) -> Decision:
    """What the processes of the run agree on after the newest update."""
    times, step = run.recipe.run, run.engine.steps_done
    said = LocalStatus(run.stops.received, run.meetings.unreadable, log_due=clock.since_log() >= times.log_seconds,
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
        warnings = collapse_warnings(row, run.recipe.head.num_prototypes,
                                     num_tokens=images * run.recipe.views.num_global, best_rank=run.best_rank)
        for kind in sorted(warnings.keys() - run.warned):  # said when it begins, not again in every row
            run.progress.say(f"warning: at update {run.engine.steps_done} {warnings[kind]}")
        run.warned = frozenset(warnings)
        run.best_rank = max(run.best_rank, row["effective_rank"])


def _close(run: Run) -> None:
    if run.book:
        run.book.close()


def _require_finite(run: Run) -> None:
    assert run.report is not None
    loss, grad_norm = float(run.report.losses.total), float(run.report.grad_norm)
    overflow = run.engine.scaler.is_enabled()  # of fp16: that update is skipped, and the scale lowered
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
