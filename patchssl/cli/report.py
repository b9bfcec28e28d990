"""`tables`, `compare` and `report`: what is made of records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from patchssl.cli.options import JsonOpt, RecordsOpt, SeedOpt, echo, out_option, say_skipped


def report(
    out: Annotated[Path, out_option("Folder that gets index.html.")],
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
    from patchssl.report.page.make import make_report
    from patchssl.runtime.console import Console

    with Console() as console:
        made = make_report(out, results=results, runs=runs or (), data=data or (), models=models or (),
                           images=images or (), console=console)
    echo(json.dumps(made.as_dict(), indent=2) if as_json else made.path)
    say_skipped(made.problems)


def tables(
    results: RecordsOpt = Path("results"),
    out: Annotated[Path | None, out_option("Folder for the table files; default: --results.")] = None,
    paper: Annotated[bool, typer.Option("--paper/--no-paper", help="Also paper.md, .csv and .tex: the paper's "
                                                                     "benchmarks, measured and published.")] = True,
    reproduce: Annotated[bool, typer.Option("--reproduce", help="Only print what to run to meet the published "
                                                                  "numbers, and how near.")] = False,
) -> None:
    """Comparison tables (Markdown, CSV, LaTeX) from the records in a folder; prints those of all datasets found."""
    if reproduce:
        from patchssl.report.reproduce import as_markdown

        echo(as_markdown(), nl=False)
        return
    from patchssl.report.tables.make import make_tables

    text, paths, problems = make_tables(results, out or results, paper=paper)
    echo(text)
    echo("written to " + ", ".join(str(path) for path in paths), err=True)
    say_skipped(problems)


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="A model with records in --results, by its name or its "
                                                            "folder's, or a record file or folder.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    results: Annotated[Path, typer.Option("--results", help="Folder of records.")] = Path("results"),
    seed: SeedOpt = 0,
    num_changes: Annotated[int, typer.Option("--num-changes", min=0, help="How many queries or classes to name.")] = 5,
    as_json: JsonOpt = False,
) -> None:
    """How much B is better than A in every task both were scored on, how surely, and where it moved most."""
    from patchssl.report.tables import compare as comparing

    sides = [comparing.find_records(name, results) for name in (first, second)]
    found = comparing.compare(*(side.records for side in sides), seed=seed, num_moved=num_changes)
    echo(json.dumps(found.as_dict(), indent=2) if as_json else found.as_text())
    say_skipped(dict.fromkeys(problem for side in sides for problem in side.problems))
