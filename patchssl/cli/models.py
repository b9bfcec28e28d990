"""`models`, `inspect` and `export`: what can be named, what a file is, and files for other tools."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from patchssl.cli.options import JsonOpt, WeightsArg, echo, out_option


def models(
    pattern: Annotated[str | None, typer.Argument(metavar="[PATTERN]", help="Part of a name, or a glob such as "
                                                                             "'*dinov2*'.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """What can be named as MODEL: size, pretraining data, license, published scores."""
    from patchssl.report import catalog

    found = catalog.known_models(pattern)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    echo(catalog.as_json(found) if as_json else catalog.as_text(found, width))


def inspect(model: WeightsArg, as_json: JsonOpt = False) -> None:
    """What a file of weights is: framework, architecture, networks inside, signs of trouble, how to evaluate it."""
    from patchssl.models.inspect import inspect_model
    from patchssl.runtime.console import Console

    with Console() as console:
        found = inspect_model(model, console.counter("tensors"))
    echo(json.dumps(found.as_dict(), indent=2) if as_json else found.as_text())
    if not found.loads:
        raise typer.Exit(1)


def export(
    model: WeightsArg,
    out: Annotated[Path, out_option("Folder to write; it must not be there yet.")],
    formats: Annotated[list[str] | None, typer.Option(
        "--format", help="timm, dino or onnx; may be given several times. Default: all that are possible.")] = None,
    license_name: Annotated[str | None, typer.Option("--license", help="License of the weights, such as "
                                                                        "apache-2.0, for the model card.")] = None,
    results: Annotated[Path, typer.Option("--results", help="Folder of records; those of these weights go into the "
                                                            "model card.")] = Path("results"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export in --out.")] = False,
    push: Annotated[str | None, typer.Option("--push", metavar="ORG/NAME", help="Upload the folder to this "
                                                                                "repository on the hub.")] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: a private repository.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Write a backbone for timm, for DINO's code and as ONNX, each checked against the original, with a model card."""
    from patchssl.export.folder import export_and_push
    from patchssl.runtime.console import Console

    with Console() as console:
        report = export_and_push(model, out, tuple(formats or ()), license_name=license_name, results=results,
                                 overwrite=overwrite, push=push, private=private, console=console)
    echo(json.dumps(report.as_dict(), indent=2) if as_json else report.as_text())
