"""The loop of a run: update after update, log, k-NN, checkpoints, and what stops it.

`checkpoint.pth` has the keys of `Engine.state_dict` and `network`, `origin`, `recipe`, `seconds`, `unreadable`.
"""

from __future__ import annotations

import math
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from patchssl.data.images import ImageSet
from patchssl.data.unreadable import TooManyUnreadable, UnreadableBudget
from patchssl.models.backbone import Origin, VitBackbone
from patchssl.models.checkpoint import NEWEST, save_checkpoint
from patchssl.pretrain.config import Recipe
from patchssl.pretrain.dataset import ViewBatch, make_loader
from patchssl.pretrain.engine import Engine, StepReport
from patchssl.pretrain.health import collapse_warnings
from patchssl.pretrain.network import network_spec
from patchssl.pretrain.recipe import dump_recipe
from patchssl.pretrain.run.clock import Clock
from patchssl.pretrain.run.log import UNREADABLE, MetricLog
from patchssl.pretrain.run.resume import ALLOW
from patchssl.pretrain.run.sync import Decision, LocalStatus, RankSync
from patchssl.runtime.device import peak_memory
from patchssl.runtime.distributed import all_gather_objects, is_orphan, lost_peer, peer_sentence, rank, world_size
from patchssl.runtime.errors import CheckpointError, DataError, Interrupted, NotFiniteError, PatchSSLError
from patchssl.runtime.loader import lost_worker
from patchssl.runtime.progress import RunProgress, Silent
from patchssl.runtime.signals import Stopped, StopSignals, ignore_sigchld, signals_kept_from_children
from patchssl.runtime.text import resume_command

_MOST_SAID = 20  # unreadable images that are named on the screen
_LONGEST_REASON = 300

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
    budget: UnreadableBudget = field(init=False)
    book: MetricLog | None = None  # of rank 0
    meetings: RankSync = field(init=False)
    saved_step: int = field(init=False)
    best_rank: float = 0.0  # highest effective rank of a row, for who watches it fall
    warned: frozenset[str] = frozenset()  # of what the newest row gave cause to

    def __post_init__(self) -> None:
        self.budget = UnreadableBudget(len(self.images), self.recipe.run.unreadable_share)
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
    except TooManyUnreadable as error:
        raise _too_many_unreadable(run, error) from None
    except (RuntimeError, ConnectionError, EOFError, CheckpointError) as error:
        if (lost := lost_worker(error)) is None:
            if not lost_peer(error):
                raise
            raise PatchSSLError(f"{peer_sentence(error)}; {_resume_sentence(run)}") from error
        # the update at hand may be half done: it is not saved
        raise PatchSSLError(f"a process that reads images ended unexpectedly, often for want of memory ({lost}); with "
                            f"fewer run.workers, {_resume_sentence(run)}") from error
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
    if done:
        _save(run)
    _close(run)
    where = f"at update {done} of {run.engine.total_steps}, saved" if done else "before the first update"
    return Interrupted(f"stopped by {stop} {where}; {then}", stop.exit_code, stop.number)


def _too_many_unreadable(run: Run, error: TooManyUnreadable) -> DataError:
    """Save what is done, and say what leads on."""
    with run.stops.held():
        if run.book and (new := {name: why for name, why in error.bad.items() if name not in run.budget.bad}):
            run.book.list_unreadable(run.engine.steps_done, new)
        _save(run)
        _close(run)
    again, done = resume_command(run.folder), run.engine.steps_done
    more = min(1.0, math.ceil(200 * len(error.bad) / error.total) / 100)
    return DataError(f"training stopped {f'at update {done}, saved' if done else 'before the first update'}: "
                     f"{error.counted()}, more than run.unreadable_share = {run.budget.share:g} allows; "
                     f"{run.folder / UNREADABLE} lists them all. Repair or remove them, then resume with: {again} "
                     f"{ALLOW}; or go on without them: {again} run.unreadable_share={more:g}\n{error.listed()}")


def _resume_sentence(run: Run) -> str:
    """From where, and how, the run can be resumed; of what was saved by now."""
    saved = (run.folder / NEWEST).exists()
    there = "resume from the last checkpoint" if saved else "nothing was saved yet; start again"
    return f"{there} with: {resume_command(run.folder)}"


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
            run.meetings.unreadable |= dict(batch.unreadable)
            run.report = engine.train_step(batch)
            run.seconds = clock.seconds()
            last = engine.steps_done == engine.total_steps
            if engine.device.type == "cpu" or last:
                _require_finite(run)
            agreed = _meet(run, clock) if last or _knn_due(run) or run.meetings.due(engine.steps_done) else None
            if agreed and (last or agreed.log_due or _knn_due(run)):
                _write_row(run, _row(run, clock.images_per_second(engine.steps_done, recipe.optim.batch_size)))
                clock.logged(engine.steps_done)
        if _knn_due(run):
            with run.stops.held():
                _save(run)  # before what may fail, or take long
            clock.saved()
            with clock.stopped():
                _measure_knn(run)
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
    if run.stops.received is None and is_orphan():
        run.progress.say("warning: torchrun is gone, which started these processes: they save and stop")
        run.stops.received = signal.SIGTERM
    said = LocalStatus(run.stops.received, run.meetings.unreadable, log_due=clock.since_log() >= times.log_seconds,
                       save_due=clock.since_save() >= 60 * times.checkpoint_minutes,
                       seconds_per_step=clock.seconds_per_step(step))
    agreed = run.meetings.hold(step, said)
    _note_unreadable(run, agreed.unreadable)
    return agreed


def _note_unreadable(run: Run, found: Mapping[str, str]) -> None:
    """Say, list and count the images `found` to be unreadable; TooManyUnreadable once all are listed."""
    new = {name: reason for name, reason in found.items() if name not in run.budget.bad}
    if run.book and new:
        run.book.list_unreadable(run.engine.steps_done, new)
        for name, reason in list(new.items())[:max(0, _MOST_SAID - run.budget.count)]:
            run.progress.say(f"warning: {name} cannot be read ({reason}) and is skipped; {run.folder / UNREADABLE} "
                             "lists all such images")
    run.budget.add_all(found)


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
        _measure_knn(run)


def _measure_knn(run: Run) -> None:
    """Complete the newest row by its k-NN, or by why there is none: a side measurement does not end a run.

    Of several processes all meet the same faults of images; after any other they would no longer be at the same place.
    """
    found: dict[str, Any] = {}
    try:
        found["knn_top1"] = run.knn(run.engine.teacher.backbone)  # type: ignore[misc]
    except Exception as error:
        if lost_worker(error) or lost_peer(error):
            raise
        reason = " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__
        if world_size() > 1 and not isinstance(error, PatchSSLError):
            raise PatchSSLError(f"the k-NN of update {run.engine.steps_done} failed in process {rank()} ({reason}); "
                                "what is done is saved, resume without k-NN: "
                                f"{resume_command(run.folder)} run.knn_every_epochs=0") from error
        found["knn_failed"] = reason
        run.progress.say(f"warning: there is no k-NN of update {run.engine.steps_done}, the run goes on without it: "
                         f"{reason}")
    with run.stops.held():
        if run.book:
            run.progress.update(run.engine.steps_done, run.engine.total_steps, run.book.complete_last(found))


def _row(run: Run, images_per_second: float) -> dict[str, Any]:
    """The log row of the newest update."""
    assert run.report is not None
    _require_finite(run)
    engine = run.engine
    return {"step": engine.steps_done, "epoch": engine.steps_done / engine.steps_per_epoch,
            "seconds": round(run.seconds, 3), **run.report.row(), "images_per_second": images_per_second,
            "memory_bytes": peak_memory(engine.device), "unreadable_images": run.budget.count}


def _write_row(run: Run, row: dict[str, Any]) -> None:
    if run.book is None:
        return
    run.book.append(row)
    if not _knn_due(run):  # else shown with it
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
        kept = (f"the last good checkpoint in {run.folder} is untouched" if (run.folder / NEWEST).exists()
                else "no checkpoint was saved before it")
        raise NotFiniteError(f"the loss is {loss}, its gradient's norm {grad_norm} at update {run.engine.steps_done}; "
                             f"{kept}; try a lower optim.lr")


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
