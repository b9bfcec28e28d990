"""`quickstart`: from nothing to a pretrained network, its score, a table and figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from patchssl.cli.options import DeviceOpt, JsonOpt, OverridesArg, SeedOpt, echo, out_option


def quickstart(
    out: Annotated[Path, out_option("Folder for run, records, table, figures.")] = Path("quickstart"),
    seed: SeedOpt = 0,
    recipe: Annotated[str, typer.Option("--recipe", help="Recipe to pretrain with.")] = "quickstart",
    overrides: OverridesArg = None,
    device: DeviceOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """From nothing to a pretrained network, its k-NN score, a table and figures: five minutes on two CPU cores."""
    from patchssl.runtime.console import Console
    from patchssl.workflows.quickstart import run_quickstart

    with Console() as console:
        summary = run_quickstart(out, seed, recipe, tuple(overrides or ()), device=device, console=console)
    echo(json.dumps(summary.as_dict(), indent=2) if as_json else summary.text())
