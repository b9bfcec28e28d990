"""The command line: parse, call one function, print. Results on stdout, progress and errors on stderr.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from patchssl import __version__
from patchssl.commands.benchmarks import bench_app
from patchssl.commands.options import DeviceOpt, JsonOpt, OverridesArg, RecordsOpt, SeedOpt, WeightsArg
from patchssl.commands.plotting import plot_app
from patchssl.commands.pretraining import pretrain
from patchssl.commands.reporting import report
from patchssl.commands.scoring import eval_app
from patchssl.commands.sets import data_app
from patchssl.commands.studies import study
from patchssl.errors import PatchSSLError, printable

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Pretrain Vision Transformers patch-wise on unlabeled images, and say how good a backbone is.")
app.add_typer(eval_app, name="eval")
app.add_typer(data_app, name="data")
app.add_typer(plot_app, name="plot")
app.add_typer(bench_app, name="bench")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"patchssl {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                                 help="Print the version.")] = False) -> None:
    """Pretrain Vision Transformers patch-wise on unlabeled images, and say how good a backbone is."""


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option("--out", help="Folder for run, records, table, figures.")] = Path("quickstart"),
    seed: SeedOpt = 0,
    recipe: Annotated[str, typer.Option("--recipe", help="Recipe to pretrain with.")] = "quickstart",
    overrides: OverridesArg = None,
    device: DeviceOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """From nothing to a pretrained network, its k-NN score, a table and figures: five minutes on two CPU cores."""
    from patchssl.console import Console
    from patchssl.quickstart import run_quickstart

    with Console() as console:
        summary = run_quickstart(out, seed, recipe, tuple(overrides or ()), device=device, console=console)
    typer.echo(json.dumps(summary.as_dict(), indent=2) if as_json else summary.text())


app.command()(pretrain)
app.command()(study)


@app.command()
def models(
    pattern: Annotated[str | None, typer.Argument(metavar="[PATTERN]", help="Part of a name, or a glob such as "
                                                                             "'*dinov2*'.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """What can be named as MODEL: size, pretraining data, license, published scores."""
    from patchssl import catalog

    found = catalog.known_models(pattern)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    typer.echo(catalog.as_json(found) if as_json else catalog.as_text(found, width))


@app.command()
def inspect(model: WeightsArg, as_json: JsonOpt = False) -> None:
    """What a file of weights is: framework, architecture, networks inside, signs of trouble, how to evaluate it."""
    from patchssl.console import Console
    from patchssl.inspection import inspect_model

    with Console() as console:
        found = inspect_model(model, console.counter("tensors"))
    typer.echo(json.dumps(found.as_dict(), indent=2) if as_json else found.as_text())
    if not found.loads:
        raise typer.Exit(1)


@app.command()
def export(
    model: WeightsArg,
    to: Annotated[Path, typer.Option("--to", help="Folder to write; it must not be there yet.")],
    formats: Annotated[list[str] | None, typer.Option(
        "--format", help="timm, dino or onnx; may be given several times. Default: all that are possible.")] = None,
    license_name: Annotated[str | None, typer.Option("--license", help="License of the weights, such as "
                                                                        "apache-2.0, for the model card.")] = None,
    results: Annotated[Path, typer.Option("--results", help="Folder of records; those of these weights go into the "
                                                            "model card.")] = Path("results"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export in --to.")] = False,
    push: Annotated[str | None, typer.Option("--push", metavar="ORG/NAME", help="Upload the folder to this "
                                                                                "repository on the hub.")] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: a private repository.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Write a backbone for timm, for DINO's code and as ONNX, each checked against the original, with a model card."""
    from patchssl.console import Console
    from patchssl.workflows import export_and_push

    with Console() as console:
        report = export_and_push(model, to, tuple(formats or ()), license_name=license_name, results=results,
                                 overwrite=overwrite, push=push, private=private, console=console)
    typer.echo(json.dumps(report.as_dict(), indent=2) if as_json else report.as_text())


@app.command()
def tables(
    results: RecordsOpt = Path("results"),
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the table files; default: --results.")] = None,
    paper: Annotated[bool, typer.Option("--paper/--no-paper", help="Also paper.md, .csv and .tex: the paper's "
                                                                     "benchmarks, measured and published.")] = True,
    reproduce: Annotated[bool, typer.Option("--reproduce", help="Only print what to run to meet the published "
                                                                  "numbers, and how near.")] = False,
) -> None:
    """Comparison tables (Markdown, CSV, LaTeX) from the records in a folder; prints those of all data sets found."""
    if reproduce:
        from patchssl.reproduce import as_markdown

        typer.echo(as_markdown(), nl=False)
        return
    from patchssl.tabling import make_tables

    text, paths, problems = make_tables(results, out or results, paper=paper)
    typer.echo(printable(text))
    typer.echo("written to " + ", ".join(str(path) for path in paths), err=True)
    _left_out(problems)


def _left_out(problems: list[str]) -> None:
    """Name the records that could not be used, and end with exit code 1 if there are any."""
    for problem in problems:
        typer.echo(printable(f"left out: {problem}"), err=True)
    if problems:
        raise typer.Exit(1)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="A model with records in --results, by its name or its "
                                                            "folder's, or a record file or folder.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    results: Annotated[Path, typer.Option("--results", help="Folder of records.")] = Path("results"),
    seed: SeedOpt = 0,
    num_moved: Annotated[int, typer.Option("--moved", min=0, help="How many queries or classes to name.")] = 5,
    as_json: JsonOpt = False,
) -> None:
    """How much B is better than A in every task both were scored on, how surely, and where it moved most."""
    from patchssl.report import compare as comparing

    sides = [comparing.find_records(name, results) for name in (first, second)]
    found = comparing.compare(*(side.records for side in sides), seed=seed, num_moved=num_moved)
    typer.echo(json.dumps(found.as_dict(), indent=2) if as_json else printable(found.as_text()))
    _left_out(list(dict.fromkeys(problem for side in sides for problem in side.problems)))


app.command()(report)


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove all of it.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Features that evaluations keep, and indexes of large archives: where, how many, how large.

    PATCHSSL_CACHE names another folder, PATCHSSL_CACHE_GIB says how many GiB of features are kept (20).
    """
    from patchssl import cachefolder
    from patchssl.eval.cache import FeatureCache

    kept = FeatureCache()
    entries = kept.entries()
    size, indexes = sum(entry.size for entry in entries), cachefolder.index_bytes()
    if clear:
        kept.clear()
        cachefolder.clear_indexes()
    if as_json:
        typer.echo(json.dumps({"folder": str(kept.folder), "entries": len(entries), "bytes": size,
                               "limit_bytes": kept.limit, "index_bytes": indexes, "cleared": clear}))
    else:
        typer.echo(f"{kept.folder}: {len(entries):,} entries, {size / 2**20:,.1f} MiB of at most "
                   f"{kept.limit / 2**30:g} GiB, and {indexes / 2**20:,.1f} MiB of archive indexes"
                   + (", removed" if clear else ""))


@app.command()
def doctor(as_json: JsonOpt = False) -> None:
    """What is installed and what will be used: torch, devices, FAISS, extras, cache folders."""
    from patchssl import doctor as examination

    findings = examination.diagnose()
    typer.echo(examination.as_json(findings) if as_json else examination.as_text(findings))
    if any(finding.verdict == "problem" for finding in findings):
        raise typer.Exit(1)


def main() -> None:
    """Entry point: run a command, end with its exit code."""
    # torch's threads wait by spinning; on a busy machine that costs 20 times the work (read when torch is imported)
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    code = _exit_code()
    if "torch" in sys.modules:
        from patchssl.distributed import end_launched

        end_launched(code)
    sys.exit(code)


def _exit_code() -> int:
    """Of the command asked for: errors become a sentence and a code, a traceback only with PATCHSSL_DEBUG=1."""
    try:
        app()
    except SystemExit as end:  # how every command ends
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        if os.environ.get("PATCHSSL_DEBUG") == "1":
            raise
        print(printable(f"patchssl: {_sentence(error)}"), file=sys.stderr)
        return error.exit_code if isinstance(error, PatchSSLError) else 1
    return 0


def _sentence(error: Exception) -> str:
    if isinstance(error, PatchSSLError):
        return str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename} cannot be used: {error.strerror}"
    return (f"this should not happen, please report it: {type(error).__name__}: {error} "
            "(PATCHSSL_DEBUG=1 shows where)")
