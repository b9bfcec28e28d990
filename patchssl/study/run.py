"""Work through a study: pretrain and score every run that is missing, together with whoever else does.

Processes share a study by its folder alone: each takes the next run that nobody has, and a process that is killed
leaves its run to the others, which resume it from its last checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from patchssl.eval.records import Result
from patchssl.eval.score import make_options
from patchssl.eval.suite import plan_suite, run_suite
from patchssl.eval.tasks import ComputeOptions
from patchssl.models.backbone import Backbone
from patchssl.models.load import load_backbone, untrained_backbone
from patchssl.pretrain.network import network_spec
from patchssl.pretrain.run.log import LOG
from patchssl.runtime.console import Console
from patchssl.runtime.device import default_device
from patchssl.runtime.errors import DataError, Interrupted, NotFiniteError, PatchSSLError
from patchssl.study.copies import synthetic_copydays
from patchssl.study.folder import RunOutcome, StudyFolder, StudyRun
from patchssl.workflows.probe import pretrain_with_probe, resume_with_probe


@dataclass
class StudyProgress:
    """How far a study is: `failed` says why, by run, `busy` are runs that other processes are at."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    busy: list[str] = field(default_factory=list)

    @property
    def settled(self) -> set[str]:
        """Nothing more is done about these."""
        return {*self.done, *self.failed}


def do_runs(folder: StudyFolder, runs: Sequence[StudyRun], left: Callable[[Sequence[StudyRun], int], str], *,
            device: str | None, console: Console) -> StudyProgress:
    """Do every one of `runs` that is missing and that no other process is at; a failed one does not stop the others.

    `left(runs, processes)` says for how long those runs keep so many processes busy. Interrupted after saving.
    """
    progress = StudyProgress()
    while True:
        before = len(progress.settled)
        progress.busy = []
        for run in runs:
            if run.name in progress.settled or _settle(folder, run, progress):
                continue
            with folder.claimed(run.name) as mine:
                if not mine:
                    progress.busy.append(run.name)
                elif not _settle(folder, run, progress):  # by another process in the meantime
                    waiting = [other for other in runs if other.name not in progress.settled]
                    console.say(f"{run.name}: run {len(progress.settled) + 1} of {len(runs)}, "
                                f"{left(waiting, 1 + len(progress.busy))}")
                    _do(folder, run, progress, device=device, console=console)
        if not progress.busy or len(progress.settled) == before:
            return progress


def _settle(folder: StudyFolder, run: StudyRun, progress: StudyProgress) -> bool:
    """Note a run that has ended."""
    if not folder.finished(run):
        return False
    found = folder.outcome(run)
    if found is not None and found.failed:
        progress.failed[run.name] = found.failed
    else:
        progress.done.append(run.name)
    return True


def _do(folder: StudyFolder, run: StudyRun, progress: StudyProgress, *, device: str | None, console: Console) -> None:
    """One run from where it is to its end."""
    try:
        do_run(folder, run, device=device, console=console)
    except Interrupted as stop:
        raise Interrupted(f"{run.name}: {stop}; or resume the study by the same command", stop.exit_code,
                          stop.number) from None
    except KeyboardInterrupt:  # pretraining has its own way with signals
        raise Interrupted(f"stopped while {run.name} was scored, nothing is lost; resume the study by the same "
                          "command") from None
    except (PatchSSLError, RuntimeError, MemoryError, OSError) as error:  # torch tells of most things by RuntimeError
        why = str(error) if isinstance(error, PatchSSLError) else f"{type(error).__name__}: {error}"
        if isinstance(error, NotFiniteError):  # the same again, whoever tries
            folder.keep(run, failed=why)
        progress.failed[run.name] = why
        console.say(f"{run.name} failed: {why}")
    else:
        progress.done.append(run.name)


def do_run(folder: StudyFolder, run: StudyRun, *, device: str | None, console: Console) -> RunOutcome:
    """Pretrain what is missing of `run`, score it, and write down what it took."""
    if run.recipe.run.threads:
        torch.set_num_threads(run.recipe.run.threads)  # also where all training is done already
    chosen = default_device(device)
    row = _pretrained(folder, run, device, console) if run.trained else {}
    began = time.monotonic()
    compute = make_options(device, workers=run.recipe.run.workers, progress=console)
    where = torch.device(compute.device or chosen)
    backbone = load_backbone(str(folder.run_folder(run)), where) if run.trained else untrained(run, where)
    _score(folder, run, backbone, compute, console)
    updates = int(row.get("step", 0))
    return folder.keep(run, weights=backbone.weights_sha256, train_seconds=row.get("seconds", 0.0),
                       score_seconds=round(time.monotonic() - began, 3),
                       images=updates * run.recipe.optim.batch_size, updates=updates, device=str(chosen),
                       threads=torch.get_num_threads())


def _pretrained(folder: StudyFolder, run: StudyRun, device: str | None, console: Console) -> Mapping[str, float]:
    """The last row of the run's log; the run is begun, or resumed, and made to its end."""
    where = folder.run_folder(run)
    if folder.begun(run):
        resume_with_probe(where, device=device, console=console)
    else:
        pretrain_with_probe(run.recipe, folder.data, where, run.seed, device=device, console=console, name=run.name)
    if not (rows := folder.log(run)):
        raise DataError(f"{where} has no {LOG} any more, which says what the run took; remove {where}, and it is run "
                        "again")
    return rows[-1]


def untrained(run: StudyRun, device: torch.device) -> Backbone:
    """The network that every variant of the run's seed begins with."""
    network = untrained_backbone(network_spec(run.recipe), run.seed, run.name)
    return network.to(device).eval().requires_grad_(False)


def _score(folder: StudyFolder, run: StudyRun, backbone: Backbone, compute: ComputeOptions, console: Console) -> None:
    """A record for every benchmark of the study that has none of these weights yet."""
    tasks = [task for task in folder.study.evaluations if task != "copydays"]
    sets: list[tuple[str, Sequence[str]]] = [(folder.data, tasks)] if tasks else []
    if "copydays" in folder.study.evaluations:
        sets.append((str(synthetic_copydays(folder, console)), ["copydays"]))
    for data, wanted in sets:
        plan = plan_suite(backbone, data, wanted, folder.records_of(run), compute)
        if plan.left_out:
            raise PatchSSLError(f"{run.name} cannot be scored: "
                                + "; ".join(f"{what}: {why}" for what, why in plan.left_out.items()))
        run_suite(backbone, plan, compute, keep=partial(_keep, folder, run), stop_at_errors=True)


def _keep(folder: StudyFolder, run: StudyRun, result: Result) -> None:
    replace(result, variant=run.variant).write(folder.records_of(run))
