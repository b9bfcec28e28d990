"""`patchssl data ...`: get, check and make datasets."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from patchssl.cli.options import JsonOpt, MadeArg, PhotosArg, SeedOpt, SideOpt, echo
from patchssl.runtime.errors import DataError
from patchssl.runtime.text import command

data_app = typer.Typer(no_args_is_help=True, help="Get, check and make datasets.")


@data_app.command("get")
def get_data(
    name: Annotated[str, typer.Argument(metavar="NAME", help="cifar10, fashion-mnist, imagenette, copydays, roxford5k, "
                                                              "rparis6k or revisitop1m.")],
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="Folder that gets the set, as ROOT/NAME.")],
    archives: Annotated[list[Path] | None, typer.Option("--from", help="Archives, or folders of them, that are "
                                                                         "here already.")] = None,
    mirror: Annotated[str | None, typer.Option("--mirror", help="Address to try first.")] = None,
    keep_archives: Annotated[bool, typer.Option("--keep-archives", help="Do not remove what was downloaded.")] = False,
) -> None:
    """Fetch a named set, resuming where an earlier attempt broke off, and check it."""
    from patchssl.runtime.console import Console
    from patchssl.sets.fetch import get_set

    with Console() as console:
        place = get_set(name, root, archives=archives or None, mirror=mirror, keep_archives=keep_archives,
                        progress=lambda what, done, total: console.update(done, total, what=what), say=console.say)
    echo(place)


@data_app.command("check")
def check_data(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder of a dataset.")],
    name: Annotated[str | None, typer.Option("--set", help="What it should be; default: what it looks like.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Count and verify a dataset on the disk; says what is missing and how to get it."""
    from patchssl.runtime.console import Console
    from patchssl.sets.check import check_set

    with Console() as console:
        report = check_set(path, name, progress=console.counter("checking"))
    echo(json.dumps(report.as_dict(), indent=2) if as_json else report.as_text())
    if not report.ok:
        raise typer.Exit(DataError.exit_code)


@data_app.command("imagenet100")
def imagenet100(
    out: MadeArg,
    imagenet: Annotated[Path, typer.Option("--from", help="ImageNet-1K, with train/ and val/ in class folders.")],
    classes: Annotated[str, typer.Option("--classes", help="cmc (the usual 100), kaggle (those PW-Self's authors "
                                                             "point to), or a file of synsets.")] = "cmc",
    copy: Annotated[bool, typer.Option("--copy", help="Copy the images instead of linking to their folders.")] = False,
) -> None:
    """ImageNet-100 as links to 100 class folders of ImageNet-1K."""
    from patchssl.runtime.console import Console
    from patchssl.sets.imagenet100 import make_imagenet100

    with Console() as console:
        echo(make_imagenet100(imagenet, out, classes=classes, copy=copy, progress=console.counter("classes")))


@data_app.command("make-copydays")
def make_copydays(
    folder: PhotosArg,
    out: MadeArg,
    seed: SeedOpt = 0,
    size: SideOpt = 1024,
    distractors: Annotated[Path | None, typer.Option("--distractors", help="Further photographs, to be told "
                                                                              "apart from the originals.")] = None,
    whitening: Annotated[Path | None, typer.Option("--whitening", help="Further photographs to fit the whitening "
                                                                          "on.")] = None,
) -> None:
    """A synthetic copy detection set in Copydays' layout from any photographs: JPEG, crops and strong edits."""
    from patchssl.runtime.console import Console
    from patchssl.sets import make as make_sets

    with Console() as console:
        made = make_sets.make_copydays(folder, out, seed=seed, size=size, distractors=distractors,
                                       whitening=whitening, workers=os.cpu_count() or 1,
                                       progress=console.counter("images"))
    ranks = made.counts["original"]
    few = f" --ranks {ranks} (protocols count 20 ranks, which takes 20 originals)" if ranks < 20 else ""
    echo(f"{made.describe()}\nscore on it: {command('eval', 'copydays', 'MODEL', '--data', out)}{few}")


@data_app.command("make-revisited")
def make_revisited(
    folder: PhotosArg,
    out: MadeArg,
    name: Annotated[str, typer.Option("--name", help="Name of the set: its ground truth is gnd_NAME.pkl.")] = "made",
    seed: SeedOpt = 0,
    num_queries: Annotated[int | None, typer.Option("--num-queries", min=1, help="Default: every photograph.")] = None,
    size: SideOpt = 640,
) -> None:
    """A small synthetic retrieval set in the layout of revisited Oxford and Paris from any photographs."""
    from patchssl.runtime.console import Console
    from patchssl.sets import make as make_sets

    with Console() as console:
        made = make_sets.make_revisited(folder, out, name=name, seed=seed, num_queries=num_queries, size=size,
                                        workers=os.cpu_count() or 1, progress=console.counter("images"))
    then = command("eval", "revisited", "MODEL", "--data", out, "--set", name)
    echo(f"{made.describe()}\nscore on it: {then}")
