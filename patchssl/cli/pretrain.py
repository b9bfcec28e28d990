"""`patchssl pretrain`: here, by several processes, as a Slurm job, or only planned."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from patchssl.cli.options import DeviceOpt, JsonOpt, OverridesArg, TrainDataOpt, echo, out_option
from patchssl.cli.slurm import (
    ClusterOpt,
    CpusOpt,
    HoursOpt,
    NodeGpusOpt,
    NodesOpt,
    PartitionOpt,
    SbatchOpt,
    SlurmOpt,
    slurm_options,
)
from patchssl.runtime.errors import UsageError
from patchssl.runtime.text import command

if TYPE_CHECKING:
    from patchssl.runtime.console import Console
    from patchssl.runtime.signals import StopSignals
    from patchssl.workflows.slurm import SlurmOptions, Submitted

NewRecipeArg = Annotated[str | None, typer.Argument(metavar="RECIPE", help="A shipped recipe or a YAML file; not "
                                                                           "needed with --resume.")]
RunOpt = Annotated[Path | None, out_option("Run folder; default runs/<recipe>-<seed>.")]
RunSeedOpt = Annotated[int | None, typer.Option("--seed", min=0, help="Fixes every random draw; default 0.")]
ResumeOpt = Annotated[Path | None, typer.Option("--resume", help="Run folder to resume; needs no more.")]
AllowOpt = Annotated[bool, typer.Option("--allow-changes", help="With --resume: resume though the recipe was "
                                                                "changed.")]
PlanOpt = Annotated[bool, typer.Option("--dry-run", help="Print images, steps, memory, time; no training.")]
ShardOpt = Annotated[bool, typer.Option("--shard", help="Under torchrun: shard the weights over all processes "
                                                        "(FSDP2).")]


@dataclass(frozen=True)
class NewRun:
    """A run that begins."""

    recipe: str
    changes: tuple[str, ...]
    data: str | None
    out: Path | None
    seed: int
    device: str | None

    def train(self, console: Console, stops: StopSignals) -> Path:
        """The run folder, at its end."""
        from patchssl.workflows.probe import pretrain_with_probe

        return pretrain_with_probe(self.recipe, self.data, self.out, self.seed, self.changes, device=self.device,
                                   console=console, stops=stops)

    def submit(self, job: SlurmOptions) -> Submitted:
        """As a job."""
        from patchssl.workflows.slurm import submit_pretraining

        return submit_pretraining(self.recipe, self.data, self.out, self.seed, self.changes, job, device=self.device)

    def print_plan(self, as_json: bool) -> None:
        """What it would cost."""
        from patchssl.workflows.probe import plan_pretraining

        plan = plan_pretraining(self.recipe, self.data, self.seed, self.changes, device=self.device)
        echo(json.dumps(plan.as_dict(), indent=2) if as_json else plan.text())


@dataclass(frozen=True)
class ResumedRun:
    """A run that is there already."""

    folder: Path
    changes: tuple[str, ...]
    allow_changes: bool
    device: str | None

    def train(self, console: Console, stops: StopSignals) -> Path:
        """The run folder, at its end."""
        from patchssl.workflows.probe import resume_with_probe

        return resume_with_probe(self.folder, self.changes, allow_changes=self.allow_changes, device=self.device,
                                 console=console, stops=stops)

    def submit(self, job: SlurmOptions) -> Submitted:
        """As a job."""
        from patchssl.workflows.slurm import submit_resume

        return submit_resume(self.folder, self.changes, job, allow_changes=self.allow_changes, device=self.device)


def pretrain(
    recipe: NewRecipeArg = None,
    overrides: OverridesArg = None,
    data: TrainDataOpt = None,
    out: RunOpt = None,
    seed: RunSeedOpt = None,
    resume: ResumeOpt = None,
    allow_changes: AllowOpt = False,
    dry_run: PlanOpt = False,
    device: DeviceOpt = None,
    shard: ShardOpt = False,
    slurm: SlurmOpt = False,
    slurm_partition: PartitionOpt = None,
    slurm_nodes: NodesOpt = None,
    slurm_gpus: NodeGpusOpt = None,
    slurm_cpus: CpusOpt = None,
    slurm_hours: HoursOpt = None,
    slurm_option: SbatchOpt = None,
    slurm_cluster: ClusterOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Pretrain a Vision Transformer with PW-Self, DINO or iBOT.

    By several processes: torchrun --nproc-per-node=N -m patchssl pretrain ...; they share out every batch.
    """
    job = slurm_options(slurm, partition=slurm_partition, nodes=slurm_nodes, gpus=slurm_gpus, cpus=slurm_cpus,
                        hours=slurm_hours, option=slurm_option, cluster=slurm_cluster)
    changes = (*(overrides or ()), *(["run.shard=true"] if shard else []))
    if resume is not None:
        _require_none(recipe, data=data, out=out, seed=seed, dry_run=dry_run or None)
        words = (recipe, *changes) if recipe else changes  # the first word is no recipe here
        _launch(ResumedRun(resume, words, allow_changes, device), job, as_json)
        return
    run = NewRun(_named(recipe, allow_changes), changes, data, out, seed or 0, device)
    if dry_run:
        run.print_plan(as_json)
    else:
        _launch(run, job, as_json)


def _require_none(recipe: str | None, **options: object) -> None:
    """UsageError, beside --resume, for what a new run alone is told."""
    given = [f"RECIPE ({recipe})"] if recipe and "=" not in recipe else []
    given += [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if given:
        raise UsageError(f"--resume RUN takes no {', '.join(given)}: recipe, data and seed are those of the run; "
                         "key=value changes its recipe")


def _named(recipe: str | None, allow_changes: bool) -> str:
    """The recipe of a new run; UsageError where there is none."""
    if allow_changes:
        raise UsageError("--allow-changes belongs to --resume RUN: a new run has nothing to differ from")
    if recipe is None or "=" in recipe:
        from patchssl.pretrain.recipe import recipe_names

        raise UsageError(f"name a recipe first ({', '.join(recipe_names())}), a YAML file, or --resume RUN")
    return recipe


def _launch(run: NewRun | ResumedRun, job: SlurmOptions | None, as_json: bool) -> None:
    """Train here, or submit the `job`, and say where the run is."""
    if job is not None:
        submitted = run.submit(job)
        echo(json.dumps(submitted.as_dict()) if as_json else submitted.text())
        return
    from patchssl.runtime.signals import StopSignals

    with StopSignals(held=True) as stops:  # before the imports, which take seconds
        from patchssl.runtime.console import Console

        with Console() as console:
            folder = run.train(console, stops)
    if os.environ.get("RANK", "0") != "0":
        return  # of several processes one answers
    if as_json:
        echo(json.dumps({"run": str(folder)}))
    else:
        echo(f"{folder}\nscore it: {command('eval', 'knn', folder, '--data', 'DIR')}")
