"""The command line: parse, call one function, print. Results on stdout, progress and errors on stderr.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchssl import __version__
from patchssl.errors import DataError, PatchSSLError, UsageError, one_of

if TYPE_CHECKING:
    from patchssl.eval.results import Result
    from patchssl.slurm import SlurmOptions

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Pretrain Vision Transformers patch-wise on unlabeled images, and say how good a backbone is.")
eval_app = typer.Typer(no_args_is_help=True, help="Score a backbone under a named protocol.")
data_app = typer.Typer(no_args_is_help=True, help="Get, check and make data sets.")
plot_app = typer.Typer(no_args_is_help=True, help="Draw attention, patch tokens, matches, views and training curves.")
bench_app = typer.Typer(no_args_is_help=True, help="Measure speed against a peer or a floor, in one run.")
app.add_typer(eval_app, name="eval")
app.add_typer(data_app, name="data")
app.add_typer(plot_app, name="plot")
app.add_typer(bench_app, name="bench")


def _not_empty(data: str | None) -> str | None:
    """`--data "$UNSET"` must not fall back to the recipe's own data."""
    if data == "":
        raise UsageError("--data is empty; name a folder of images or a set, such as textures")
    return data


def _can_be_folder(results: Path) -> Path:
    """A record that cannot be written is known before hours of work, not after."""
    there = next(place for place in (results, *results.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise DataError(f"--results {results}: {there} is no folder")
    return results


def _can_be_written(results: Path) -> Path:
    """The same, for commands that write there."""
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
DATA = ("Images (see README, Data sets): a folder, {wanted}; a list (.txt); a .zip or .tar; shards-{{000..009}}.tar; "
        ".parquet; hf:OWNER/NAME[:SPLIT]; timm:torch/NAME?root=DIR; or a set's name: textures, textures-64.")
DataOpt = Annotated[str, typer.Option("--data", callback=_not_empty,
                                      help=DATA.format(wanted="train/ and val/ inside"))]
ResultsOpt = Annotated[Path, typer.Option("--results", callback=_can_be_written, help="Folder that gets the record.")]
RecordsOpt = Annotated[Path, typer.Option("--results", callback=_can_be_folder, help="Folder of the records.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
DeviceOpt = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one.")]
BatchOpt = Annotated[int, typer.Option("--batch-size", min=1, help="Images per forward pass.")]
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


@app.command()
def pretrain(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A shipped recipe or a YAML file; not needed "
                                                                          "with --resume.")] = None,
    overrides: OverridesArg = None,
    data: Annotated[str | None, typer.Option("--data", callback=_not_empty,
                                             help=DATA.format(wanted="with or without classes"))] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; default runs/<recipe>-<seed>.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0,
                                             help="Fixes every random draw; default 0.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Run folder to go on with; needs no more.")] = None,
    allow_changes: Annotated[bool, typer.Option("--allow-changes", help="With --resume: go on though the recipe was "
                                                                          "changed.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print images, steps, memory, time; no training.")] = False,
    device: DeviceOpt = None,
    shard: Annotated[bool, typer.Option("--shard", help="Under torchrun: deal the weights over all processes "
                                                          "(FSDP2).")] = False,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit it as a job that requeues itself until the run is "
                                                        "done.")] = False,
    slurm_partition: Annotated[str | None, typer.Option(help="Partition of the job.")] = None,
    slurm_nodes: Annotated[int | None, typer.Option(min=1, help="Machines; default 1.")] = None,
    slurm_gpus: Annotated[int | None, typer.Option(min=0, help="GPUs, and processes, on each; default 1.")] = None,
    slurm_cpus: Annotated[int | None, typer.Option(min=1, help="CPUs for each process; default 8.")] = None,
    slurm_hours: Annotated[float | None, typer.Option(min=0.02, help="Until it is requeued; default 24.")] = None,
    slurm_option: Annotated[list[str] | None, typer.Option(
        metavar="KEY=VALUE", help="Further option of sbatch, such as mem=64G; may be given several times.")] = None,
    slurm_cluster: Annotated[str | None, typer.Option(help="slurm, or local: a process of this machine, for a trial."
                                                      )] = None,
    as_json: JsonOpt = False,
) -> None:
    """Pretrain a Vision Transformer with PW-Self, DINO or iBOT.

    By several processes: torchrun --nproc-per-node=N -m patchssl pretrain ...; they share out every batch.
    """
    job = _slurm_options(slurm, partition=slurm_partition, nodes=slurm_nodes, gpus=slurm_gpus, cpus=slurm_cpus,
                         hours=slurm_hours, option=slurm_option, cluster=slurm_cluster)
    changes = (*(overrides or ()), *(["run.shard=true"] if shard else []))
    if resume is not None:
        given = _refused_with_resume(recipe, data=data, out=out, seed=seed, dry_run=dry_run or None)
        if given:
            raise UsageError(f"--resume RUN takes no {given}: recipe, data and seed are those of the run; key=value "
                             "changes its recipe")
        changes = (recipe, *changes) if recipe else changes  # the first word is no recipe here
    elif allow_changes:
        raise UsageError("--allow-changes belongs to --resume RUN: a new run has nothing to differ from")
    elif recipe is None or "=" in recipe:
        raise UsageError(f"name a recipe first ({', '.join(_shipped_recipes())}), a YAML file, or --resume RUN")
    if dry_run:
        _print_plan(str(recipe), changes, data, seed or 0, device, as_json)
    elif job is not None:
        _submit(recipe, changes, data, out, seed or 0, resume, allow_changes, device, job, as_json)
    else:
        _pretrain_here(recipe, changes, data, out, seed or 0, resume, allow_changes, device, as_json)


def _pretrain_here(recipe: str | None, changes: tuple[str, ...], data: str | None, out: Path | None, seed: int,
                   resume: Path | None, allow_changes: bool, device: str | None, as_json: bool) -> None:
    from patchssl.console import Console
    from patchssl.workflows import pretrain_with_probe, resume_with_probe

    with Console() as console:
        if resume is not None:
            folder = resume_with_probe(resume, changes, allow_changes=allow_changes, device=device, console=console)
        else:
            folder = pretrain_with_probe(str(recipe), data, out, seed, changes, device=device, console=console)
    if os.environ.get("RANK", "0") != "0":
        return  # of several processes one answers
    if as_json:
        typer.echo(json.dumps({"run": str(folder)}))
    else:
        typer.echo(f"{folder}\nscore it: patchssl eval knn {folder} --data DIR")


@eval_app.command()
def knn(
    model: ModelArg,
    data: DataOpt,
    protocol: Annotated[str | None, typer.Option("--protocol", help="dino or native; default: dino for models "
                                                                       "trained at 224 px, else native.")] = None,
    shots: Annotated[list[int] | None, typer.Option("--shots", min=1, help="Also score with so many training images "
                                                                             "per class; may be given several times."
                                                    )] = None,
    draws: Annotated[int, typer.Option("--draws", min=1, help="How often --shots draws its images.")] = 5,
    seed: SeedOpt = 0,
    index: IndexOpt = "Flat",
    search_params: SearchParamsOpt = "",
    gpus: GpusOpt = "one",
    results: ResultsOpt = Path("results"),
    device: DeviceOpt = None,
    batch_size: BatchOpt = 64,
    workers: WorkersOpt = 2,
    cached: CacheOpt = True,
    as_json: JsonOpt = False,
) -> None:
    """k-NN classification on frozen features: vote of the nearest training images."""
    from patchssl.console import Console
    from patchssl.scoring import make_options
    from patchssl.workflows import score_knn

    with Console() as console:
        options = make_options(device, batch_size, workers, cached=cached)
        result = score_knn(model, data, protocol, device=device, batch_size=batch_size, workers=workers,
                           console=console, cache=options.cache, shots=tuple(shots or ()), draws=draws, seed=seed,
                           index=index, search_params=search_params, gpus=gpus)
    _print_record(result, results, as_json)


@eval_app.command()
def linear(
    model: ModelArg,
    data: DataOpt,
    protocol: Annotated[str | None, typer.Option("--protocol", help="cached, native, dino (100 epochs, as DINO trains) "
                                                                       "or logreg; default: cached for models trained "
                                                                       "at 224 px, else native.")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Instead of the protocol's own number; "
                                                                              "another protocol, such as "
                                                                              "dino-10-epochs.")] = None,
    seed: SeedOpt = 0,
    results: ResultsOpt = Path("results"),
    device: DeviceOpt = None,
    batch_size: BatchOpt = 64,
    workers: WorkersOpt = 2,
    cached: CacheOpt = True,
    as_json: JsonOpt = False,
) -> None:
    """Linear classifiers on frozen features, with a 95 % interval."""
    from patchssl import scoring
    from patchssl.console import Console

    with Console() as console:
        options = scoring.make_options(device, batch_size, workers, cached=cached)
        result = scoring.score_linear(model, data, protocol, options, epochs=epochs, seed=seed, results=results,
                                      console=console)
    _print_record(result, results, as_json)


@eval_app.command()
def copydays(
    model: ModelArg,
    data: FolderOpt,
    protocol: Annotated[str | None, typer.Option("--protocol", help="dino, dino-nodistractors, dino-nowhitening, "
                                                                       "dino-plain, sscd, sscd-224 or native; default: "
                                                                       "dino for models trained at 224 px.")] = None,
    distractors: DistractorsOpt = None,
    whitening: WhiteningOpt = None,
    results: ResultsOpt = Path("results"),
    device: DeviceOpt = None,
    batch_size: BatchOpt = 64,
    workers: WorkersOpt = 2,
    cached: CacheOpt = True,
    as_json: JsonOpt = False,
) -> None:
    """Copy detection on Copydays, or a set in its layout: mAP of all 20 blocks."""
    from patchssl import scoring
    from patchssl.console import Console

    with Console() as console:
        options = scoring.make_options(device, batch_size, workers, cached=cached)
        result = scoring.score_copydays(model, data, protocol, options, distractors=distractors, whitening=whitening,
                                        console=console)
    _print_record(result, results, as_json)


@eval_app.command()
def revisited(
    model: ModelArg,
    data: FolderOpt,
    set_name: Annotated[str, typer.Option("--set", help="roxford5k, rparis6k, or the NAME of gnd_NAME.pkl.")],
    protocol: Annotated[str | None, typer.Option("--protocol", help="revisitop, dino, ibot or native; default: dino "
                                                                       "for models trained at 224 px.")] = None,
    distractors: Annotated[Path | None, typer.Option("--distractors", help="Folder of images that join the database, "
                                                                              "such as revisitop1m.")] = None,
    allow_truncated: Annotated[bool, typer.Option("--allow-truncated", help="Read files that end early, as the "
                                                                              "official code does.")] = False,
    results: ResultsOpt = Path("results"),
    device: DeviceOpt = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images of one size per pass.")] = 16,
    workers: WorkersOpt = 2,
    cached: CacheOpt = True,
    as_json: JsonOpt = False,
) -> None:
    """Retrieval on revisited Oxford and Paris, or a set in their layout: easy, medium, hard."""
    from patchssl import scoring
    from patchssl.console import Console

    with Console() as console:
        options = scoring.make_options(device, batch_size, workers, cached=cached)
        result = scoring.score_revisited(model, data, set_name, protocol, options, distractors=distractors,
                                         allow_truncated=allow_truncated, console=console)
    _print_record(result, results, as_json)


@eval_app.command()
def patches(
    model: ModelArg,
    data: Annotated[str, typer.Option("--data", callback=_not_empty, help="Folder of images, labels not needed, or a "
                                                                          "set's name; its val images if it has "
                                                                          "them.")],
    protocol: Annotated[str | None, typer.Option("--protocol", help="native, the only one.")] = None,
    pairs: Annotated[int, typer.Option("--pairs", min=1, help="Pairs of views per image.")] = 1,
    seed: SeedOpt = 0,
    results: ResultsOpt = Path("results"),
    device: DeviceOpt = None,
    batch_size: BatchOpt = 64,
    workers: WorkersOpt = 2,
    as_json: JsonOpt = False,
) -> None:
    """Patch correspondence: how often a patch finds its place in another view, beside raw pixels and chance."""
    from patchssl import scoring
    from patchssl.console import Console

    with Console() as console:
        options = scoring.make_options(device, batch_size, workers, cached=False)
        result = scoring.score_patches(model, data, protocol, options, pairs=pairs, seed=seed, console=console)
    _print_record(result, results, as_json)


@eval_app.command("all")
def eval_all(
    model: ModelArg,
    data: Annotated[str, typer.Option("--data", callback=_not_empty, help="A set, or a folder of sets side by side.")],
    tasks: Annotated[list[str] | None, typer.Option("--task", help="knn, linear, copydays, revisited or patches; may "
                                                                     "be given several times. Default: all but "
                                                                     "patches.")] = None,
    results: ResultsOpt = Path("results"),
    overwrite: Annotated[bool, typer.Option("--overwrite/--skip-existing", help="Run again what has a record, or only "
                                                                                  "what is missing.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print plan, images, time; run nothing.")] = False,
    distractors: DistractorsOpt = None,
    whitening: WhiteningOpt = None,
    revisited_distractors: Annotated[Path | None, typer.Option(
        "--revisited-distractors", help="Folder of images, such as revisitop1m, that join the database of every "
                                        "revisited set, for records of their own beside those without; 'eval "
                                        "revisited --distractors' for all sets.")] = None,
    index: IndexOpt = "Flat",
    search_params: SearchParamsOpt = "",
    gpus: GpusOpt = "one",
    device: DeviceOpt = None,
    batch_size: BatchOpt = 64,
    workers: WorkersOpt = 2,
    as_json: JsonOpt = False,
) -> None:
    """Every benchmark that the data there allows and that has no record yet; one table at the end."""
    from patchssl import scoring
    from patchssl.console import Console
    from patchssl.distributed import rank

    with Console() as console:
        options = scoring.make_options(device, batch_size, workers)
        choices = scoring.make_choices(distractors, whitening, revisited_distractors, index=index,
                                       search_params=search_params, gpus=gpus)
        if dry_run:
            _, plan = scoring.plan_all(model, data, tuple(tasks or ()), results, options, choices=choices,
                                       overwrite=overwrite, say=console.say)
            typer.echo(json.dumps(plan.as_dict(), indent=2) if as_json else plan.text())
            return
        plan, found, failed = scoring.score_all(model, data, tuple(tasks or ()), results, options, choices=choices,
                                                overwrite=overwrite, console=console)
    if rank():
        return
    summary = scoring.Summary(plan, found, failed, results)
    typer.echo(json.dumps(summary.as_dict(), indent=2) if as_json else summary.text())
    if failed:
        raise typer.Exit(1)


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
) -> None:
    """Comparison tables (Markdown, CSV, LaTeX) from the records in a folder; prints those of all data sets found."""
    from patchssl.workflows import make_tables

    text, paths, problems = make_tables(results, out or results, paper=paper)
    typer.echo(text)
    typer.echo("written to " + ", ".join(str(path) for path in paths), err=True)
    for problem in problems:
        typer.echo(f"left out: {problem}", err=True)
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

    found = comparing.compare(comparing.find_records(first, results), comparing.find_records(second, results),
                              seed=seed, num_moved=num_moved)
    text = json.dumps(found.as_dict(), indent=2) if as_json else found.as_text()
    typer.echo("".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text))


@data_app.command("get")
def get_data(
    name: Annotated[str, typer.Argument(metavar="NAME", help="cifar10, fashion-mnist, copydays, roxford5k, rparis6k or "
                                                              "revisitop1m.")],
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="Folder that gets the set, as ROOT/NAME.")],
    archives: Annotated[list[Path] | None, typer.Option("--from", help="Archives, or folders of them, that are "
                                                                         "here already.")] = None,
    mirror: Annotated[str | None, typer.Option("--mirror", help="Address to try first.")] = None,
    keep_archives: Annotated[bool, typer.Option("--keep-archives", help="Do not remove what was downloaded.")] = False,
) -> None:
    """Fetch a named set, going on where an earlier attempt broke off, and check it."""
    from patchssl.console import Console
    from patchssl.fetch_sets import get_set

    with Console() as console:
        place = get_set(name, root, archives=archives or None, mirror=mirror, keep_archives=keep_archives,
                        progress=lambda what, done, total: console.update(done, total, what=what), say=console.say)
    typer.echo(place)


@data_app.command("check")
def check_data(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder of a data set.")],
    name: Annotated[str | None, typer.Option("--set", help="What it should be; default: what it looks like.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Count and verify a data set on the disk; says what is missing and how to get it."""
    from patchssl.check_sets import check_set
    from patchssl.console import Console

    with Console() as console:
        report = check_set(path, name, progress=console.counter("checking"))
    typer.echo(json.dumps(report.as_dict(), indent=2) if as_json else report.as_text())
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
    from patchssl.console import Console
    from patchssl.imagenet100 import make_imagenet100

    with Console() as console:
        typer.echo(make_imagenet100(imagenet, out, classes=classes, copy=copy, progress=console.counter("classes")))


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
    """A copy detection set in Copydays' layout from any photographs: JPEG, crops and strong edits."""
    from patchssl import make_sets
    from patchssl.console import Console

    with Console() as console:
        made = make_sets.make_copydays(folder, out, seed=seed, size=size, distractors=distractors,
                                       whitening=whitening, workers=os.cpu_count() or 1,
                                       progress=console.counter("images"))
    typer.echo(f"{made.describe()}\nscore on it: patchssl eval copydays MODEL --data {out}")


@data_app.command("make-revisited")
def make_revisited(
    folder: PhotosArg,
    out: MadeArg,
    name: Annotated[str, typer.Option("--name", help="Name of the set: its ground truth is gnd_NAME.pkl.")] = "made",
    seed: SeedOpt = 0,
    num_queries: Annotated[int | None, typer.Option("--num-queries", min=1, help="Default: every photograph.")] = None,
    size: SideOpt = 640,
) -> None:
    """A small retrieval set in the layout of revisited Oxford and Paris from any photographs."""
    from patchssl import make_sets
    from patchssl.console import Console

    with Console() as console:
        made = make_sets.make_revisited(folder, out, name=name, seed=seed, num_queries=num_queries, size=size,
                                        workers=os.cpu_count() or 1, progress=console.counter("images"))
    typer.echo(f"{made.describe()}\nscore on it: patchssl eval revisited MODEL --data {out} --set {name}")


@plot_app.command()
def attention(
    model: ModelArg,
    images: ImagesArg,
    size: Annotated[int | None, typer.Option("--size", min=8, help="Short side in pixels.")] = None,
    out: OutFileOpt = Path("attention.png"),
    device: DeviceOpt = None,
) -> None:
    """Attention of the class token to the patches, per head and on average, in the last block."""
    from patchssl.drawing import draw_attention
    from patchssl.workflows import default_device

    typer.echo(draw_attention(model, images, out, size=size, device=default_device(device)))


@plot_app.command()
def pca(
    model: ModelArg,
    images: ImagesArg,
    size: Annotated[int | None, typer.Option("--size", min=8, help="Short side in pixels.")] = None,
    out: OutFileOpt = Path("pca.png"),
    device: DeviceOpt = None,
) -> None:
    """Patch tokens of all images together as colors, by their three main components: alike tokens look alike."""
    from patchssl.drawing import draw_pca
    from patchssl.workflows import default_device

    typer.echo(draw_pca(model, images, out, size=size, device=default_device(device)))


@plot_app.command()
def matches(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="An image file, or SET:INDEX as in textures:7.")],
    recipe: RecipeOpt = "quickstart",
    model: ViewsOfOpt = None,
    rule: Annotated[str | None, typer.Option("--rule", help="center or paper; default: the recipe's.")] = None,
    seed: SeedOpt = 0,
    out: OutFileOpt = Path("matches.png"),
) -> None:
    """Patches that show the same place in two views of an image, with the same number and color."""
    from patchssl.drawing import draw_matches, recipe_of

    typer.echo(draw_matches(image, recipe_of(recipe, model, rule), out, seed=seed))


@plot_app.command()
def views(images: ImagesArg, recipe: RecipeOpt = "quickstart", model: ViewsOfOpt = None, seed: SeedOpt = 0,
          out: OutFileOpt = Path("views.png")) -> None:
    """The augmented views that a network is trained on, one row per image."""
    from patchssl.drawing import draw_views, recipe_of

    typer.echo(draw_views(images, recipe_of(recipe, model), out, seed=seed))


@plot_app.command()
def curves(run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
           out: OutFileOpt = Path("curves.png")) -> None:
    """Loss, k-NN, entropy and effective rank of a run."""
    from patchssl.drawing import draw_curves

    typer.echo(draw_curves(run, out))


@bench_app.command("views")
def bench_views(image: Annotated[Path | None, typer.Option("--image", help="A photograph; default: one made up, "
                                                                             "500 x 375 pixels.")] = None) -> None:
    """Crops and color of one image against lightly's and torchvision's transforms; JSON on stdout."""
    from patchssl import bench

    typer.echo(json.dumps(bench.bench_views(image), indent=2))


@bench_app.command("matching")
def bench_matching() -> None:
    """Patch matching of a batch against similarity matching; JSON on stdout."""
    from patchssl import bench

    typer.echo(json.dumps(bench.bench_matching(), indent=2))


@bench_app.command("step")
def bench_step(
    arch: Annotated[list[str] | None, typer.Option("--arch", help="vit_tiny, vit_small; again for more.")] = None,
    prototypes: Annotated[list[int] | None, typer.Option("--prototypes", min=2, help="K; again for more.")] = None,
    images: Annotated[int, typer.Option("--images", min=1, help="Images of an update.")] = 2,
    repeats: Annotated[int, typer.Option("--repeats", min=1)] = 3, device: DeviceOpt = None,
) -> None:
    """A training step beside one that projects every token, and beside plain autograd; JSON on stdout."""
    from patchssl import bench_training as bench
    from patchssl.console import Console
    from patchssl.errors import UsageError, one_of

    for name in arch or ():
        if name not in bench.ARCHS:
            raise UsageError(one_of("architecture", name, bench.ARCHS))
    with Console() as console:
        found = bench.bench_step(arch or tuple(bench.ARCHS), prototypes or bench.PROTOTYPES, images, repeats,
                                 device or "cpu", progress=console.counter("bench"))
        typer.echo(json.dumps(found, indent=2))


@bench_app.command("eval")
def bench_eval(
    model: Annotated[str | None, typer.Option("--model", help="With --data: time 'eval all' of this MODEL.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Data for --model.")] = None,
) -> None:
    """k-NN, scoring and linear probes, a second 'eval all' beside the first, each against a floor; JSON on stdout."""
    from patchssl import bench_eval as bench
    from patchssl.console import Console

    with Console() as console:
        typer.echo(json.dumps(bench.bench_eval(model, data, console=console), indent=2))


@bench_app.command("tables")
def bench_tables(num_records: Annotated[int, typer.Option("--records", min=1, help="How many.")] = 10_000) -> None:
    """Seconds from made-up records to all tables; JSON on stdout."""
    from patchssl import bench_report

    typer.echo(json.dumps(bench_report.bench_tables(num_records), indent=2))


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove all of it.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Features that evaluations keep: where, how many, how large (PATCHSSL_CACHE names another folder)."""
    from patchssl.eval.cache import FeatureCache

    kept = FeatureCache()
    entries = kept.entries()
    size = kept.clear() if clear else sum(entry.size for entry in entries)
    if as_json:
        typer.echo(json.dumps({"folder": str(kept.folder), "entries": len(entries), "bytes": size,
                               "limit_bytes": kept.limit, "cleared": clear}))
    else:
        typer.echo(f"{kept.folder}: {len(entries):,} entries, {size / 2**20:,.1f} MiB of at most "
                   f"{kept.limit / 2**30:.0f} GiB" + (", removed" if clear else ""))


@app.command()
def doctor(as_json: JsonOpt = False) -> None:
    """What is installed and what will be used: torch, devices, FAISS, extras, cache folders."""
    from patchssl import doctor as examination

    findings = examination.diagnose()
    typer.echo(examination.as_json(findings) if as_json else examination.as_text(findings))
    if any(finding.verdict == "problem" for finding in findings):
        raise typer.Exit(1)


def _print_record(result: Result, results: Path, as_json: bool) -> None:
    """Write the record and print it whole, or its main numbers."""
    from patchssl.distributed import rank
    from patchssl.scoring import headline

    if rank():
        return  # all processes have the same record, the first one writes it
    path = result.write(results)
    typer.echo(path.read_text() if as_json else f"{headline(result)}\nwritten to {path}", nl=not as_json)


def _refused_with_resume(recipe: str | None, **options: object) -> str:
    """What of a new run's arguments was given, for a sentence."""
    given = [f"RECIPE ({recipe})"] if recipe and "=" not in recipe else []
    given += [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    return ", ".join(given)


def _slurm_options(slurm: bool, **given: Any) -> SlurmOptions | None:
    """What was asked of Slurm; None without --slurm."""
    given = {name: value for name, value in given.items() if value is not None}
    if not slurm:
        if given:
            raise UsageError(f"--slurm-{next(iter(given))} needs --slurm, which submits the run as a job")
        return None
    from patchssl.slurm import SlurmOptions

    if given.get("cluster", "slurm") not in ("slurm", "local"):
        raise UsageError(one_of("cluster", given["cluster"], ("slurm", "local")))
    options = given.pop("option", [])
    if wrong := [option for option in options if "=" not in option]:
        raise UsageError(f"--slurm-option {wrong[0]} is not KEY=VALUE, for example mem=64G")
    return SlurmOptions(**given, others=dict(option.split("=", 1) for option in options))


def _submit(recipe: str | None, changes: tuple[str, ...], data: str | None, out: Path | None, seed: int,
            resume: Path | None, allow_changes: bool, device: str | None, job: SlurmOptions, as_json: bool) -> None:
    from patchssl.slurm import submit_pretraining, submit_resume

    if resume is not None:
        submitted = submit_resume(resume, changes, job, allow_changes=allow_changes, device=device)
    else:
        submitted = submit_pretraining(str(recipe), data, out, seed, changes, job, device=device)
    typer.echo(json.dumps(submitted.as_dict()) if as_json else submitted.text())


def _shipped_recipes() -> list[str]:
    from patchssl.pretrain.config import recipe_names

    return recipe_names()


def _print_plan(recipe: str, overrides: tuple[str, ...], data: str | None, seed: int, device: str | None,
                as_json: bool) -> None:
    from patchssl.workflows import plan_pretraining

    plan = plan_pretraining(recipe, data, seed, overrides, device=device)
    typer.echo(json.dumps(plan.as_dict(), indent=2) if as_json else plan.text())


def main() -> None:
    """Entry point: errors become a sentence and an exit code, a traceback only with PATCHSSL_DEBUG=1."""
    # torch's threads wait by spinning; on a busy machine that costs 20 times the work (read when torch is imported)
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        app()
    except Exception as error:
        if os.environ.get("PATCHSSL_DEBUG") == "1":
            raise
        # names come from files, and a terminal obeys what it is sent
        print("".join(c if c.isprintable() or c == "\n" else "?" for c in f"patchssl: {_sentence(error)}"),
              file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, PatchSSLError) else 1)


def _sentence(error: Exception) -> str:
    if isinstance(error, PatchSSLError):
        return str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename} cannot be used: {error.strerror}"
    return (f"this should not happen, please report it: {type(error).__name__}: {error} "
            "(PATCHSSL_DEBUG=1 shows where)")
