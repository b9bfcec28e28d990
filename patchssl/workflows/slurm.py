"""Pretraining as a job of Slurm, by submitit: submitted, and requeued by itself until the run is done.

Slurm warns a job before its time is over; the run then saves and stops (see `patchssl.runtime.signals`), the job is
put back in the queue, and what it does there is resume the run. submitit's own handler of that warning would
requeue in the middle of an update: it is called when the run has saved.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from patchssl.data.open import absolute_name
from patchssl.pretrain.config import Recipe
from patchssl.pretrain.recipe import load_recipe
from patchssl.pretrain.run.resume import FACTS, begun_with, changed_recipe, read_run
from patchssl.pretrain.run.start import require_new, run_folder
from patchssl.pretrain.schedules import unfinished
from patchssl.runtime.console import Console
from patchssl.runtime.errors import Interrupted, PatchSSLError, UsageError, printable
from patchssl.runtime.seeds import require_seed
from patchssl.workflows.probe import pretrain_with_probe, resume_with_probe

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission


WARNINGS = (signal.SIGUSR2, signal.SIGUSR1)  # of submitit, of Slurm; SIGTERM means stop, and Slurm itself requeues
SECONDS_TO_SAVE = 180  # the warning comes so long before the end
MOST_REQUEUES = 10_000  # the run itself knows when it is done


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """What a job asks for; one process for every GPU, one without GPUs."""

    cluster: str = "slurm"  # or local: a process of this machine, for a trial
    partition: str | None = None
    nodes: int = 1
    gpus: int = 1  # on each node
    cpus: int = 8  # for each process
    hours: float = 24.0  # until the job is requeued
    others: dict[str, str] = field(default_factory=dict)  # further options of sbatch, such as mem=64G

    def parameters(self, name: str) -> dict[str, Any]:
        """In submitit's words."""
        found: dict[str, Any] = {
            "name": name, "nodes": self.nodes, "tasks_per_node": max(1, self.gpus), "cpus_per_task": self.cpus,
            "timeout_min": max(1, round(60 * self.hours)), "stderr_to_stdout": True,
            "slurm_signal_delay_s": SECONDS_TO_SAVE}
        if self.gpus:
            found["gpus_per_node"] = self.gpus
        if self.partition:
            found["slurm_partition"] = self.partition
        if self.others:
            found["slurm_additional_parameters"] = self.others
        return found


@dataclass(frozen=True)
class Submitted:
    """A job in the queue."""

    job: str
    run: str
    logs: str
    warnings: tuple[str, ...] = ()  # what the run will not do although its recipe speaks of it

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)

    def text(self) -> str:
        """For people."""
        return "\n".join([f"job {self.job} is submitted; its run is {self.run}",
                          f"what it says: tail -f {self.logs}/{self.job}_0_log.out",
                          *(f"warning: {sentence}" for sentence in self.warnings)])


@dataclass(frozen=True)
class PretrainJob:
    """What the job does, each time it starts: begin the run in `folder`, or resume the one that is there."""

    folder: Path
    recipe: Recipe | None  # None: the run is there
    seed: int = 0
    overrides: tuple[str, ...] = ()
    allow_changes: bool = False
    device: str | None = None

    def __call__(self) -> str:
        """Run to the end; warned by Slurm, save, requeue and exit."""
        requeue = _requeue()
        join_processes()
        try:
            with Console() as console:
                return str(self._train(console))
        except Interrupted as stop:
            print(printable(f"patchssl: {stop}"), file=sys.stderr, flush=True)
            if stop.number in WARNINGS and requeue:
                requeue()
            sys.exit(stop.exit_code)  # no exception: submitit would note that the job failed

    def checkpoint(self) -> DelayedSubmission:
        """What submitit puts back in the queue: the same job, which finds the run's checkpoints."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _train(self, console: Console) -> Path:
        if (self.folder / FACTS).exists() or self.recipe is None:
            return resume_with_probe(self.folder, self.overrides, allow_changes=self.allow_changes,
                                     device=self.device, console=console)
        return pretrain_with_probe(self.recipe, None, self.folder, self.seed, device=self.device, console=console)


def submit_pretraining(recipe: str, data: str | None, out: Path | None, seed: int, overrides: tuple[str, ...],
                       options: SlurmOptions, *, device: str | None) -> Submitted:
    """Submit a new run; UsageError for what can be known to be wrong before it starts."""
    require_seed(seed)
    effective = load_recipe(recipe, overrides)
    if data is None and effective.data is None:
        raise UsageError("no data was named: give --data FOLDER (or a set's name), or set data in the recipe")
    effective = effective.model_copy(update={"data": absolute_name(data or effective.data or "")})
    folder = (out or run_folder(recipe, seed)).absolute()
    require_new(folder)
    if (folder / FACTS).exists():
        raise UsageError(f"{folder} holds a run that has not saved yet; resume it with --resume {folder}, or remove it")
    return _submit(PretrainJob(folder, effective, seed, device=device), options)


def submit_resume(folder: Path, overrides: tuple[str, ...], options: SlurmOptions, *, allow_changes: bool,
                  device: str | None) -> Submitted:
    """Submit the rest of the run in `folder`; UsageError for changes of its recipe that would be refused."""
    _, facts = read_run(folder)
    changed_recipe(folder, begun_with(facts, None), overrides, allow_changes)
    return _submit(PretrainJob(folder.absolute(), None, overrides=overrides, allow_changes=allow_changes,
                               device=device), options)


def _submit(job: PretrainJob, options: SlurmOptions) -> Submitted:
    submitit = _submitit()
    logs = job.folder / "slurm"
    try:
        executor = submitit.AutoExecutor(logs, cluster=options.cluster,
                                         **{f"{options.cluster}_max_num_timeout": MOST_REQUEUES})
        executor.update_parameters(**options.parameters(job.folder.name))
        warnings = tuple(unfinished(job.recipe)) if job.recipe else ()
        return Submitted(str(executor.submit(job).job_id), str(job.folder), str(logs), warnings)
    except (RuntimeError, ValueError, submitit.core.utils.FailedJobError,
            submitit.core.utils.FailedSubmissionError) as error:
        raise PatchSSLError(f"the job could not be submitted: {' '.join(str(error).split())}") from error


def _submitit() -> ModuleType:
    try:
        import submitit
    except ImportError:
        raise UsageError("--slurm needs the library submitit: pip install 'patchssl[slurm]'") from None
    return submitit


def join_processes() -> None:
    """Where the job has several processes, tell each one its rank as torchrun would."""
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    if JobEnvironment().num_tasks > 1:
        # every process sees all GPUs of its machine and takes that of its local rank
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def _requeue() -> Callable[[], Any] | None:
    """submitit's own answer to Slurm's warning, which it has set up when the job starts."""
    for number in WARNINGS:
        if callable(handler := signal.getsignal(number)):
            return partial(handler, number, None)
    return None
