"""The options of `patchssl pretrain --slurm`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchssl.runtime.errors import UsageError, unknown_choice

if TYPE_CHECKING:
    from patchssl.workflows.slurm import SlurmOptions

SlurmOpt = Annotated[bool, typer.Option("--slurm", help="Submit it as a job that requeues itself until the run is "
                                                        "done.")]
PartitionOpt = Annotated[str | None, typer.Option(help="Partition of the job.")]
NodesOpt = Annotated[int | None, typer.Option(min=1, help="Machines; default 1.")]
NodeGpusOpt = Annotated[int | None, typer.Option(min=0, help="GPUs, and processes, on each; default 1.")]
CpusOpt = Annotated[int | None, typer.Option(min=1, help="CPUs for each process; default 8.")]
HoursOpt = Annotated[float | None, typer.Option(min=0.02, help="Until it is requeued; default 24.")]
SbatchOpt = Annotated[list[str] | None, typer.Option(
    metavar="KEY=VALUE", help="Further option of sbatch, such as mem=64G; may be given several times.")]
ClusterOpt = Annotated[str | None, typer.Option(help="slurm, or local: a process of this machine, for a trial.")]


def slurm_options(slurm: bool, **given: Any) -> SlurmOptions | None:
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
