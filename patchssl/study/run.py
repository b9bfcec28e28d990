"""Work through a study: pretrain and score every cell that is missing, together with whoever else does.

Processes share a study by its folder alone: each takes the next cell that nobody has, and a process that is killed
leaves its cell to the others, which go on from its last checkpoint.
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
from patchssl.study.copies import made_copydays
from patchssl.study.folder import RunOutcome, StudyFolder, StudyRun
from patchssl.workflows.probe import pretrain_with_probe, resume_with_probe


@dataclass
class StudyProgress:
    """How far a study is: `failed` says why, by cell, `busy` are cells that other processes are at."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    busy: list[str] = field(default_factory=list)

    @property
    def settled(self) -> set[str]:
        """Nothing more is done about these."""
        return {*self.done, *self.failed}


def run_cells(place: StudyFolder, cells: Sequence[StudyRun], left: Callable[[Sequence[StudyRun], int], str], *,
              device: str | None, console: Console) -> StudyProgress:
    """Do every one of `cells` that is missing and that no other process is at; a failed one does not stop the others.

    `left(cells, processes)` says for how long those cells keep so many processes busy. Interrupted after saving.
    """
    progress = StudyProgress()
    while True:
        before = len(progress.settled)
        progress.busy = []
        for cell in cells:
            if cell.name in progress.settled or _settle(place, cell, progress):
                continue
            with place.claimed(cell.name) as mine:
                if not mine:
                    progress.busy.append(cell.name)
                elif not _settle(place, cell, progress):  # by another process in the meantime
                    waiting = [other for other in cells if other.name not in progress.settled]
                    console.say(f"{cell.name}: cell {len(progress.settled) + 1} of {len(cells)}, "
                                f"{left(waiting, 1 + len(progress.busy))}")
                    _do(place, cell, progress, device=device, console=console)
        if not progress.busy or len(progress.settled) == before:
            return progress


def _settle(place: StudyFolder, cell: StudyRun, progress: StudyProgress) -> bool:
    """Note a cell that has ended."""
    if not place.finished(cell):
        return False
    found = place.outcome(cell)
    if found is not None and found.failed:
        progress.failed[cell.name] = found.failed
    else:
        progress.done.append(cell.name)
    return True


def _do(place: StudyFolder, cell: StudyRun, progress: StudyProgress, *, device: str | None, console: Console) -> None:
    """One cell from where it is to its end."""
    try:
        do_cell(place, cell, device=device, console=console)
    except Interrupted as stop:
        raise Interrupted(f"{cell.name}: {stop}; or go on with the study by the same command", stop.exit_code,
                          stop.number) from None
    except KeyboardInterrupt:  # pretraining has its own way with signals
        raise Interrupted(f"stopped while {cell.name} was scored, nothing is lost; go on with the study by the same "
                          "command") from None
    except (PatchSSLError, RuntimeError, MemoryError, OSError) as error:  # torch tells of most things by RuntimeError
        why = str(error) if isinstance(error, PatchSSLError) else f"{type(error).__name__}: {error}"
        if isinstance(error, NotFiniteError):  # the same again, whoever tries
            place.keep(cell, failed=why)
        progress.failed[cell.name] = why
        console.say(f"{cell.name} failed: {why}")
    else:
        progress.done.append(cell.name)


def do_cell(place: StudyFolder, cell: StudyRun, *, device: str | None, console: Console) -> RunOutcome:
    """Pretrain what is missing of `cell`, score it, and write down what it took."""
    if cell.recipe.run.threads:
        torch.set_num_threads(cell.recipe.run.threads)  # also where all training is done already
    chosen = default_device(device)
    row = _pretrained(place, cell, device, console) if cell.trained else {}
    began = time.monotonic()
    compute = make_options(device, workers=cell.recipe.run.workers, progress=console)
    backbone = (load_backbone(str(place.run(cell)), chosen) if cell.trained else untrained(cell, chosen))
    _score(place, cell, backbone, compute, console)
    updates = int(row.get("step", 0))
    return place.keep(cell, weights=backbone.weights_sha256, train_seconds=row.get("seconds", 0.0),
                      score_seconds=round(time.monotonic() - began, 3),
                      images=updates * cell.recipe.optim.batch_size, updates=updates, device=str(chosen),
                      threads=torch.get_num_threads())


def _pretrained(place: StudyFolder, cell: StudyRun, device: str | None, console: Console) -> Mapping[str, float]:
    """The last row of the log of the cell's run, which is begun, or gone on with, and made to its end."""
    folder = place.run(cell)
    if place.begun(cell):
        resume_with_probe(folder, device=device, console=console)
    else:
        pretrain_with_probe(cell.recipe, place.data, folder, cell.seed, device=device, console=console, name=cell.name)
    if not (rows := place.log(cell)):
        raise DataError(f"{folder} has no {LOG} any more, which says what the run took; remove {folder}, and it is run "
                        "again")
    return rows[-1]


def untrained(cell: StudyRun, device: torch.device) -> Backbone:
    """The network that every variant of the cell's seed begins with."""
    network = untrained_backbone(network_spec(cell.recipe), cell.seed, cell.name)
    return network.to(device).eval().requires_grad_(False)


def _score(place: StudyFolder, cell: StudyRun, backbone: Backbone, compute: ComputeOptions, console: Console) -> None:
    """A record for every benchmark of the study that has none of these weights yet."""
    tasks = [task for task in place.study.evaluations if task != "copydays"]
    sets: list[tuple[str, Sequence[str]]] = [(place.data, tasks)] if tasks else []
    if "copydays" in place.study.evaluations:
        sets.append((str(made_copydays(place, console)), ["copydays"]))
    for data, wanted in sets:
        plan = plan_suite(backbone, data, wanted, place.records_of(cell), compute)
        if plan.left_out:
            raise PatchSSLError(f"{cell.name} cannot be scored: "
                                + "; ".join(f"{what}: {why}" for what, why in plan.left_out.items()))
        run_suite(backbone, plan, compute, keep=partial(_keep, place, cell), stop_at_errors=True)


def _keep(place: StudyFolder, cell: StudyRun, result: Result) -> None:
    replace(result, variant=cell.variant).write(place.records_of(cell))
