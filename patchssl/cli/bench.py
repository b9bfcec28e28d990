"""`patchssl bench ...`: speed beside a peer or a floor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from patchssl.cli.options import DeviceOpt, can_be_written, echo

bench_app = typer.Typer(no_args_is_help=True, help="Measure speed against a peer or a floor, in one run.")


@bench_app.command("views")
def bench_views(image: Annotated[Path | None, typer.Option("--image", help="A photograph; default: one made up, "
                                                                             "500 x 375 pixels.")] = None) -> None:
    """Crops and color of one image against lightly's and torchvision's transforms; JSON on stdout."""
    from patchssl.bench import views as bench

    echo(json.dumps(bench.bench_views(image), indent=2))


@bench_app.command("matching")
def bench_matching() -> None:
    """Patch matching of a batch against similarity matching; JSON on stdout."""
    from patchssl.bench.matching import bench_matching as matching

    echo(json.dumps(matching(), indent=2))


@bench_app.command("step")
def bench_step(
    arch: Annotated[list[str] | None, typer.Option("--arch", help="vit_tiny, vit_small; again for more.")] = None,
    prototypes: Annotated[list[int] | None, typer.Option("--prototypes", min=2, help="K; again for more.")] = None,
    images: Annotated[int, typer.Option("--images", min=1, help="Images of an update.")] = 2,
    repeats: Annotated[int, typer.Option("--repeats", min=1)] = 3, device: DeviceOpt = None,
    results: Annotated[Path | None, typer.Option("--results", callback=can_be_written,
                                                 help="Folder that gets records for the cost table of 'patchssl "
                                                      "tables'.")] = None,
) -> None:
    """A training step beside DINO, iBOT, one that projects every token, and plain autograd; JSON on stdout."""
    from patchssl.bench import step as bench
    from patchssl.runtime.console import Console
    from patchssl.runtime.errors import UsageError, unknown_choice

    for name in arch or ():
        if name not in bench.ARCHS:
            raise UsageError(unknown_choice("architecture", name, bench.ARCHS))
    with Console() as console:
        found = bench.bench_step(arch or tuple(bench.ARCHS), prototypes or bench.PROTOTYPES, images, repeats,
                                 device or "cpu", progress=console.counter("bench"))
    echo(json.dumps(found, indent=2))
    if results:
        for cost in bench.cost_records(found):
            echo(f"written to {cost.write(results)}", err=True)


@bench_app.command("eval")
def bench_eval(
    model: Annotated[str | None, typer.Option("--model", help="With --data: time 'eval all' of this MODEL.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Data for --model.")] = None,
) -> None:
    """k-NN, scoring and linear probes, a second 'eval all' beside the first, each against a floor; JSON on stdout."""
    from patchssl.bench import eval as bench
    from patchssl.runtime.console import Console

    with Console() as console:
        echo(json.dumps(bench.bench_eval(model, data, console=console), indent=2))
