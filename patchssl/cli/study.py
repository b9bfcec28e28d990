"""`patchssl study`: a grid of variants and seeds from one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from patchssl.cli.options import DeviceOpt, JsonOpt, StudyDataOpt, echo, out_option


def study(
    source: Annotated[str, typer.Argument(metavar="STUDY", help="A shipped study (textures, fashion-mnist, cifar10, "
                                                                  "imagenette, imagenet100, imagenet1k) or a YAML "
                                                                  "file.")],
    data: StudyDataOpt = None,
    out: Annotated[Path | None, out_option("Folder of runs, records and tables; default studies/<name>. Processes that "
                                           "share it share the work.")] = None,
    only: Annotated[list[str] | None, typer.Option("--only", metavar="VARIANT", help="This variant alone; may be given "
                                                                                      "several times.")] = None,
    seeds: Annotated[list[int] | None, typer.Option("--only-seed", min=0, help="This seed of the study alone; may be "
                                                                                 "given several times.")] = None,
    ablations: Annotated[bool, typer.Option("--ablations", help="Also the further variants, after the core "
                                                                  "comparison.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print runs, updates, time and the tables to fill; run "
                                                              "nothing.")] = False,
    device: DeviceOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Pretrain and score variants of a recipe with paired seeds, only what is missing, and compare them.

    Start it as often as there are cores or GPUs: all processes share the work. After Ctrl-C or a kill the same command
    resumes it.
    """
    from patchssl.runtime.console import Console
    from patchssl.study import command

    with Console() as console:
        asked = command.ask(source, out, data, only=only or (), seeds=seeds or (), ablations=ablations, device=device,
                            planning=dry_run)
        if dry_run:
            plan, tables = command.plan(asked, console)
            echo(json.dumps(plan.as_dict(), indent=2) if as_json else f"{plan.text()}\n\n{tables}")
            return
        answer = command.run(asked, console)
    echo(json.dumps(answer.as_dict(), indent=2) if as_json else answer.text())
    if answer.progress.failed:
        raise typer.Exit(1)
