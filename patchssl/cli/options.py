"""Arguments and options that several commands share, options by their old names, and the printing of a record."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from patchssl.runtime.errors import DataError, Interrupted, UsageError, printable

if TYPE_CHECKING:
    from patchssl.eval.records import Result
    from patchssl.runtime.console import Console


def echo(said: object, *, err: bool = False, nl: bool = True) -> None:
    """Print what a command answers, on stdout or stderr: names in it come from files, and none moves the cursor."""
    # bytes that are no UTF-8 are shown as such
    typer.echo(printable(str(said).encode("utf-8", "backslashreplace").decode()), err=err, nl=nl)


def _escaped(text: str) -> str:
    """JSON of the same meaning in which all can be printed."""
    return "".join(letter if letter.isprintable() or letter == "\n" else json.dumps(letter)[1:-1] for letter in text)


def not_empty(data: str | None) -> str | None:
    """`--data "$UNSET"` must not fall back to the recipe's own data."""
    if data == "":
        raise UsageError("--data is empty; name a folder of images or a set, such as textures")
    return data


def _not_here(out: str | Path) -> Path:
    """`--out "$UNSET"` must not mean the folder one is in, which is `.`"""
    if out == "":
        raise UsageError("--out is empty; name a folder (the one you are in is .)")
    return Path(out)


def out_option(told: str) -> Any:
    """`--out` of a command that makes a folder."""
    return typer.Option("--out", parser=_not_here, metavar="PATH", help=told)


def _can_be_folder(results: Path) -> Path:
    """A record that cannot be written is known before hours of work, not after."""
    there = next(place for place in (results, *results.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise DataError(f"--results {results}: {there} is no folder")
    return results


def can_be_written(results: Path | None) -> Path | None:
    """The same, for commands that write there."""
    if results is None:
        return None
    there = next(place for place in (_can_be_folder(results), *results.absolute().parents) if place.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise DataError(f"--results {results}: nothing can be written in {there}; name another folder")
    return results


ModelArg = Annotated[str, typer.Argument(
    metavar="MODEL", help="A run folder, a file of weights (PATH#student for the other network), timm:NAME, "
                          "hf-hub:ORG/NAME, random:NAME?img_size=..., py:MODULE:FACTORY, or pixels?img_size=...; see "
                          "'patchssl models'.")]
WeightsArg = Annotated[str, typer.Argument(
    metavar="MODEL", help="A run folder, a file of weights (PATH#student), an exported folder, timm:NAME or "
                          "hf-hub:ORG/NAME.")]


def _data(wanted: str) -> Any:
    """`--data`, of which a folder is to hold what is `wanted`."""
    return typer.Option("--data", callback=not_empty, help=(
        f"Images (see README, Datasets): a folder, {wanted}; a list (.txt); a .zip or .tar; shards-{{000..009}}.tar; "
        ".parquet; hf:OWNER/NAME[:SPLIT]; timm:torch/NAME?root=DIR; or a set's name: textures, textures-64."))


DataOpt = Annotated[str, _data("train/ and val/ inside")]
StudyDataOpt = Annotated[str | None, _data("train/ and val/ inside")]
TrainDataOpt = Annotated[str | None, _data("with or without classes")]
ResultsOpt = Annotated[Path, typer.Option("--results", callback=can_be_written, help="Folder that gets the record.")]
RecordsOpt = Annotated[Path, typer.Option("--results", callback=_can_be_folder, help="Folder of the records.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
DeviceOpt = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one.")]
BatchOpt = Annotated[int | None, typer.Option("--batch-size", min=1, help="Images per forward pass; default: 64, "
                                              "revisited sets, whose images are large: "
                                              "16.")]
WorkersOpt = Annotated[int, typer.Option("--workers", min=0, help="Processes that decode images.")]
CacheOpt = Annotated[bool, typer.Option("--cache/--no-cache", help="Keep features, see 'patchssl cache'.")]
IndexOpt = Annotated[str, typer.Option("--index", help="FAISS index of k-NN, such as IVF256,PQ48 or HNSW32; what it "
                                                       "misses is measured. Flat is exact.")]
SearchParamsOpt = Annotated[str, typer.Option("--search-params", help="Of the index, such as nprobe=16.")]
GpusOpt = Annotated[str, typer.Option("--gpus", help="k-NN searches on one GPU, or on all: shard or replicate.")]
DistractorsOpt = Annotated[Path | None, typer.Option("--distractors", help="Folder of photographs that join the "
                                                                             "database of Copydays; default: "
                                                                             "distractors/ beside its blocks.")]
WhiteningOpt = Annotated[Path | None, typer.Option("--whitening", help="Folder of photographs to fit Copydays' "
                                                                         "whitening on; default: whitening/ beside its "
                                                                         "blocks.")]
FolderOpt = Annotated[Path, typer.Option("--data", help="Folder of the set.")]
SeedOpt = Annotated[int, typer.Option("--seed", min=0, help="Fixes every random draw.")]
OutFileOpt = Annotated[Path, typer.Option("--out", help="Figure to write: .png, .svg or .pdf.")]
ImagesArg = Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files, or SET:INDEX as in textures:7.")]
RecipeOpt = Annotated[str, typer.Option("--recipe", help="Recipe, YAML file or run folder whose views are drawn.")]
PhotosArg = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of photographs, at any depth.")]
MadeArg = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make; it must not be there yet.")]
SideOpt = Annotated[int, typer.Option("--size", min=128, help="Longest side of an image in pixels.")]
OverridesArg = Annotated[list[str] | None, typer.Argument(
    metavar="KEY=VALUE", help="Changes to the recipe, such as optim.epochs=20.")]
ViewsOfOpt = Annotated[str | None, typer.Option("--model", help="Take patch and view size from this MODEL.")]


def renamed(new_of: Mapping[str, str]) -> type[TyperCommand]:
    """What a command is made of that takes options by their old names too, {old: new}, for one release."""
    class CommandOfOldNames(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            return super().parse_args(ctx, _by_new_names(args, new_of))

    return CommandOfOldNames


def _by_new_names(args: Sequence[str], new_of: Mapping[str, str]) -> list[str]:
    """The words of a command line with new names for old ones, which a warning names; UsageError where both stand."""
    end = args.index("--") if "--" in args else len(args)
    words = [arg.partition("=") for arg in args[:end]]
    names = {name for name, _, _ in words}
    for old, new in new_of.items():
        if {old, new} <= names:
            raise UsageError(f"{old} is the old name of {new}; give {new} alone")
        if old in names:
            echo(f"warning: {old} is now {new}; the old name goes with the next release", err=True)
    return ["".join((new_of.get(name, name), *rest)) for name, *rest in words] + [*args[end:]]


def say_skipped(problems: Iterable[str]) -> None:
    """Name the records that could not be used, and end with exit code 1 if there are any."""
    problems = list(problems)
    for problem in problems:
        echo(f"skipped: {problem}", err=True)
    if problems:
        raise typer.Exit(1)


@contextmanager
def scoring_console() -> Iterator[Console]:
    """The console of a benchmark, whose Ctrl-C ends with what there is to resume from."""
    from patchssl.runtime.console import Console

    with Console() as console:
        try:
            yield console
        except KeyboardInterrupt:
            raise Interrupted("stopped by Ctrl-C; records that were written stay, and the same command resumes from "
                              "the features that are in the cache (patchssl cache)") from None


def print_record(result: Result, results: Path, as_json: bool) -> None:
    """Write the record and print it whole, or its main numbers."""
    from patchssl.eval.score import headline, keep_result
    from patchssl.runtime.distributed import rank

    if rank():
        return  # all processes have the same record, the first one writes it
    try:
        path = keep_result(result, results)
    except DataError:
        echo(json.dumps(result.as_dict(), indent=2) if as_json else headline(result))
        raise
    echo(_escaped(path.read_text("utf-8")) if as_json else f"{headline(result)}\nwritten to {path}", nl=not as_json)
