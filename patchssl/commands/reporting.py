"""`patchssl report`: one page of everything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from patchssl.commands.options import JsonOpt, RecordsOpt
from patchssl.errors import printable


def report(
    out: Annotated[Path, typer.Option("--out", help="Folder that gets index.html.")],
    results: RecordsOpt = Path("results"),
    runs: Annotated[list[Path] | None, typer.Option("--runs", help="A run folder, or a folder of them, for curves and "
                                                                     "health; may be given several times.")] = None,
    data: Annotated[list[Path] | None, typer.Option("--data", help="A folder in which the images of galleries are "
                                                                     "looked up by name; may be given several "
                                                                     "times.")] = None,
    models: Annotated[list[str] | None, typer.Option("--model", help="A MODEL whose attention and matches are drawn; "
                                                                        "may be given several times.")] = None,
    images: Annotated[list[str] | None, typer.Option("--image", help="What --model is drawn on: image files, or "
                                                                        "SET:INDEX. Default: queries of the galleries, "
                                                                        "else textures.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """One HTML page that needs no network: tables, curves, robustness, worst and best queries, protocols, versions."""
    from patchssl.console import Console
    from patchssl.reporting import make_report

    with Console() as console:
        made = make_report(out, results=results, runs=runs or (), data=data or (), models=models or (),
                           images=images or (), console=console)
    typer.echo(json.dumps(made.as_dict(), indent=2) if as_json else made.path)
    for problem in made.problems:
        typer.echo(printable(f"left out: {problem}"), err=True)
    if made.problems:
        raise typer.Exit(1)
