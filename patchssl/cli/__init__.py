"""The command line: parse, call one function, print. Results on stdout, progress and errors on stderr.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from patchssl import __version__
from patchssl.cli.bench import bench_app
from patchssl.cli.data import data_app
from patchssl.cli.eval import eval_app
from patchssl.cli.machine import cache, doctor
from patchssl.cli.models import export, inspect, models
from patchssl.cli.plot import plot_app
from patchssl.cli.pretrain import pretrain
from patchssl.cli.quickstart import quickstart
from patchssl.cli.report import compare, report, tables
from patchssl.cli.study import study
from patchssl.runtime.errors import PatchSSLError, printable

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


for command in (quickstart, pretrain, study, models, inspect, export, tables, compare, report, cache, doctor):
    app.command()(command)


def main() -> None:
    """Entry point: run a command, end with its exit code."""
    # torch's threads wait by spinning; on a busy machine that costs 20 times the work (read when torch is imported)
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    code = _exit_code()
    if "torch" in sys.modules:
        from patchssl.runtime.distributed import end_launched

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
