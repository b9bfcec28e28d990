"""The command line: parse, call one function, print. Results on stdout, progress and errors on stderr.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import warnings
from typing import Annotated, Any

import typer

from patchssl import __version__
from patchssl.cli import machine, models, pretrain, quickstart, report, study
from patchssl.cli.bench import bench_app
from patchssl.cli.data import data_app
from patchssl.cli.eval import eval_app
from patchssl.cli.options import echo, renamed
from patchssl.cli.plot import plot_app
from patchssl.runtime.errors import PatchSSLError, causes, printable

_OLD_NAMES = {study.study: {"--seed": "--only-seed"}, models.export: {"--to": "--out"},
              report.compare: {"--moved": "--num-changes"}}


def _version(asked: bool) -> None:
    if asked:
        echo(f"patchssl {__version__}")
        raise typer.Exit


def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                                 help="Print the version.")] = False) -> None:
    """Pretrain Vision Transformers patch-wise on unlabeled images, and say how good a backbone is."""


def build_app() -> typer.Typer:
    """All commands; those of `eval` are what is registered by now."""
    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, callback=_root)
    for name, group in (("eval", eval_app()), ("data", data_app), ("plot", plot_app), ("bench", bench_app)):
        app.add_typer(group, name=name)
    for command in (quickstart.quickstart, pretrain.pretrain, study.study, models.models, models.inspect, models.export,
                    report.tables, report.compare, report.report, machine.cache, machine.doctor):
        app.command(cls=renamed(_OLD_NAMES.get(command, {})))(command)
    return app


def main() -> None:
    """Entry point: run a command, end with its exit code."""
    # torch's threads wait by spinning; on a busy machine that costs 20 times the work (read when torch is imported)
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    for stream in (sys.stdout, sys.stderr):  # names of files may hold what the terminal's encoding has not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if logging.lastResort is not None:  # what the package's warnings go through, unless someone set up logging
        logging.lastResort.setFormatter(_PlainLines())
    code = _exit_code()
    if "torch" in sys.modules:
        from patchssl.runtime.distributed import end_launched

        end_launched(code)
    sys.exit(code)


class _PlainLines(logging.Formatter):
    """Lines of a log in which no name from a file moves the cursor."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _exit_code() -> int:
    """Of the command asked for: errors become a sentence and a code, a traceback only with PATCHSSL_DEBUG=1."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _said_in_a_line(warnings.showwarning)
            build_app()()
    except SystemExit as end:  # how every command ends
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        if os.environ.get("PATCHSSL_DEBUG") == "1":
            raise
        echo(f"patchssl: {_sentence(error)}", err=True)
        return error.exit_code if isinstance(error, PatchSSLError) else 1
    return 0


def _said_in_a_line(otherwise: Any) -> Any:
    """What shows a FutureWarning, which is for users, without the path and the code where it arose."""
    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, FutureWarning):
            otherwise(printable(str(message)), category, *where, **more)
        elif os.environ.get("RANK", "0") == "0":  # of several processes one speaks
            echo(f"warning: {message}", err=True)

    return show


def _sentence(error: Exception) -> str:
    if isinstance(error, PatchSSLError):
        return str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename} cannot be used: {error.strerror}"
    if full := _full_disk(error):
        return f"{full}: not all could be written; free some space, or name a place on another disk, and start again"
    if "torch" in sys.modules:
        from patchssl.runtime.distributed import lost_peer, peer_sentence
        from patchssl.runtime.loader import lost_worker

        if lost_peer(error):
            return f"{peer_sentence(error)}; start it again"
        if (lost := lost_worker(error)) is not None:
            return (f"a process that reads images ended unexpectedly, often for want of memory ({lost}); try again "
                    "with fewer --workers, or a smaller --batch-size")
    return (f"this should not happen, please report it: {type(error).__name__}: {error} "
            "(PATCHSSL_DEBUG=1 shows where)")


def _full_disk(error: BaseException | None) -> str:
    """What the system says of a disk, a quota or a file that takes no more; "" where that is not the reason."""
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return cause.strerror or str(cause)
    return ""
