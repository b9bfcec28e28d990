"""`patchssl pretrain`: here, by several processes, as a Slurm job, or only planned."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchssl.cli.options import DATA, DeviceOpt, JsonOpt, OverridesArg, not_empty
from patchssl.runtime.errors import UsageError, unknown_choice

if TYPE_CHECKING:
    from patchssl.workflows.slurm import SlurmOptions


def pretrain(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A shipped recipe or a YAML file; not needed "
                                                                          "with --resume.")] = None,
    overrides: OverridesArg = None,
    data: Annotated[str | None, typer.Option("--data", callback=not_empty,
                                             help=DATA.format(wanted="with or without classes"))] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; default runs/<recipe>-<seed>.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0,
                                             help="Fixes every random draw; default 0.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Run folder to go on with; needs no more.")] = None,
    allow_changes: Annotated[bool, typer.Option("--allow-changes", help="With --resume: go on though the recipe was "
                                                                          "changed.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print images, steps, memory, time; no training.")] = False,
    device: DeviceOpt = None,
    shard: Annotated[bool, typer.Option("--shard", help="Under torchrun: deal the weights over all processes "
                                                          "(FSDP2).")] = False,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit it as a job that requeues itself until the run is "
                                                        "done.")] = False,
    slurm_partition: Annotated[str | None, typer.Option(help="Partition of the job.")] = None,
    slurm_nodes: Annotated[int | None, typer.Option(min=1, help="Machines; default 1.")] = None,
    slurm_gpus: Annotated[int | None, typer.Option(min=0, help="GPUs, and processes, on each; default 1.")] = None,
    slurm_cpus: Annotated[int | None, typer.Option(min=1, help="CPUs for each process; default 8.")] = None,
    slurm_hours: Annotated[float | None, typer.Option(min=0.02, help="Until it is requeued; default 24.")] = None,
    slurm_option: Annotated[list[str] | None, typer.Option(
        metavar="KEY=VALUE", help="Further option of sbatch, such as mem=64G; may be given several times.")] = None,
    slurm_cluster: Annotated[str | None, typer.Option(help="slurm, or local: a process of this machine, for a trial."
                                                      )] = None,
    as_json: JsonOpt = False,
) -> None:
    """Pretrain a Vision Transformer with PW-Self, DINO or iBOT.

    By several processes: torchrun --nproc-per-node=N -m patchssl pretrain ...; they share out every batch.
    """
    job = _slurm_options(slurm, partition=slurm_partition, nodes=slurm_nodes, gpus=slurm_gpus, cpus=slurm_cpus,
                         hours=slurm_hours, option=slurm_option, cluster=slurm_cluster)
    changes = (*(overrides or ()), *(["run.shard=true"] if shard else []))
    if resume is not None:
        given = _refused_with_resume(recipe, data=data, out=out, seed=seed, dry_run=dry_run or None)
        if given:
            raise UsageError(f"--resume RUN takes no {given}: recipe, data and seed are those of the run; key=value "
                             "changes its recipe")
        changes = (recipe, *changes) if recipe else changes  # the first word is no recipe here
    elif allow_changes:
        raise UsageError("--allow-changes belongs to --resume RUN: a new run has nothing to differ from")
    elif recipe is None or "=" in recipe:
        raise UsageError(f"name a recipe first ({', '.join(_shipped_recipes())}), a YAML file, or --resume RUN")
    if dry_run:
        _print_plan(str(recipe), changes, data, seed or 0, device, as_json)
    elif job is not None:
        _submit(recipe, changes, data, out, seed or 0, resume, allow_changes, device, job, as_json)
    else:
        _pretrain_here(recipe, changes, data, out, seed or 0, resume, allow_changes, device, as_json)


def _pretrain_here(recipe: str | None, changes: tuple[str, ...], data: str | None, out: Path | None, seed: int,
                   resume: Path | None, allow_changes: bool, device: str | None, as_json: bool) -> None:
    from patchssl.runtime.signals import StopSignals

    with StopSignals(held=True) as stops:  # before the imports, which take seconds
        from patchssl.runtime.console import Console
        from patchssl.workflows.probe import pretrain_with_probe, resume_with_probe

        with Console() as console:
            if resume is not None:
                folder = resume_with_probe(resume, changes, allow_changes=allow_changes, device=device,
                                           console=console, stops=stops)
            else:
                folder = pretrain_with_probe(str(recipe), data, out, seed, changes, device=device, console=console,
                                             stops=stops)
    if os.environ.get("RANK", "0") != "0":
        return  # of several processes one answers
    if as_json:
        typer.echo(json.dumps({"run": str(folder)}))
    else:
        typer.echo(f"{folder}\nscore it: patchssl eval knn {folder} --data DIR")


def _refused_with_resume(recipe: str | None, **options: object) -> str:
    """What of a new run's arguments was given, for a sentence."""
    given = [f"RECIPE ({recipe})"] if recipe and "=" not in recipe else []
    given += [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    return ", ".join(given)


def _slurm_options(slurm: bool, **given: Any) -> SlurmOptions | None:
    """What was asked of Slurm; None without --slurm."""
    given = {name: value for name, value in given.items() if value is not None}
    if not slurm:
        if given:
            raise UsageError(f"--slurm-{next(iter(given))} needs --slurm, which submits the run as a job")
        return None
    from patchssl.workflows.slurm import SlurmOptions

    if given.get("cluster", "slurm") not in ("slurm", "local"):
        raise UsageError(unknown_choice("cluster", given["cluster"], ("slurm", "local")))
    options = given.pop("option", [])
    if wrong := [option for option in options if "=" not in option]:
        raise UsageError(f"--slurm-option {wrong[0]} is not KEY=VALUE, for example mem=64G")
    return SlurmOptions(**given, others=dict(option.split("=", 1) for option in options))


def _submit(recipe: str | None, changes: tuple[str, ...], data: str | None, out: Path | None, seed: int,
            resume: Path | None, allow_changes: bool, device: str | None, job: SlurmOptions, as_json: bool) -> None:
    from patchssl.workflows.slurm import submit_pretraining, submit_resume

    if resume is not None:
        submitted = submit_resume(resume, changes, job, allow_changes=allow_changes, device=device)
    else:
        submitted = submit_pretraining(str(recipe), data, out, seed, changes, job, device=device)
    typer.echo(json.dumps(submitted.as_dict()) if as_json else submitted.text())


def _shipped_recipes() -> list[str]:
    from patchssl.pretrain.recipe import recipe_names

    return recipe_names()


def _print_plan(recipe: str, overrides: tuple[str, ...], data: str | None, seed: int, device: str | None,
                as_json: bool) -> None:
    from patchssl.workflows.probe import plan_pretraining

    plan = plan_pretraining(recipe, data, seed, overrides, device=device)
    typer.echo(json.dumps(plan.as_dict(), indent=2) if as_json else plan.text())
