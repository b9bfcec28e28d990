"""`patchssl eval ...`: a backbone under named protocols."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from patchssl.cli.options import (
    BatchOpt,
    CacheOpt,
    DataOpt,
    DeviceOpt,
    DistractorsOpt,
    FolderOpt,
    GpusOpt,
    IndexOpt,
    JsonOpt,
    ModelArg,
    ResultsOpt,
    SearchParamsOpt,
    SeedOpt,
    WhiteningOpt,
    WorkersOpt,
    not_empty,
    print_record,
    scoring_console,
)

eval_app = typer.Typer(no_args_is_help=True, help="Score a backbone under a named protocol.")


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
    from patchssl.eval.score import make_options, score_knn

    with scoring_console() as console:
        options = make_options(device, batch_size, workers, cached=cached)
        result = score_knn(model, data, protocol, device=device, batch_size=batch_size, workers=workers,
                           console=console, cache=options.cache, shots=tuple(shots or ()), draws=draws, seed=seed,
                           index=index, search_params=search_params, gpus=gpus)
    print_record(result, results, as_json)


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
    from patchssl.eval import score

    with scoring_console() as console:
        options = score.make_options(device, batch_size, workers, cached=cached)
        result = score.score_linear(model, data, protocol, options, epochs=epochs, seed=seed, results=results,
                                    console=console)
    print_record(result, results, as_json)


@eval_app.command()
def copydays(
    model: ModelArg,
    data: FolderOpt,
    protocol: Annotated[str | None, typer.Option("--protocol", help="dino, dino-nodistractors, dino-nowhitening, "
                                                                       "dino-plain, sscd, sscd-224 or native; default: "
                                                                       "dino for models trained at 224 px.")] = None,
    ranks: Annotated[int | None, typer.Option("--ranks", min=1, help="How many results count, for a set too small "
                                                                           "for the protocol's 20 (sscd: 100); another "
                                                                           "protocol, as native-12-ranks.")] = None,
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
    from patchssl.eval import score

    with scoring_console() as console:
        options = score.make_options(device, batch_size, workers, cached=cached)
        result = score.score_copydays(model, data, protocol, options, ranks=ranks, distractors=distractors,
                                      whitening=whitening, console=console)
    print_record(result, results, as_json)


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
    from patchssl.eval import score

    with scoring_console() as console:
        options = score.make_options(device, batch_size, workers, cached=cached)
        result = score.score_revisited(model, data, set_name, protocol, options, distractors=distractors,
                                       allow_truncated=allow_truncated, console=console)
    print_record(result, results, as_json)


@eval_app.command()
def patches(
    model: ModelArg,
    data: Annotated[str, typer.Option("--data", callback=not_empty, help="Folder of images, labels not needed, or a "
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
    from patchssl.eval import score

    with scoring_console() as console:
        options = score.make_options(device, batch_size, workers, cached=False)
        result = score.score_patches(model, data, protocol, options, pairs=pairs, seed=seed, console=console)
    print_record(result, results, as_json)


@eval_app.command("all")
def eval_all(
    model: ModelArg,
    data: Annotated[str, typer.Option("--data", callback=not_empty, help="A set, or a folder of sets side by side.")],
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
    from patchssl.eval import score
    from patchssl.runtime.distributed import rank

    with scoring_console() as console:
        options = score.make_options(device, batch_size, workers)
        choices = score.make_choices(distractors, whitening, revisited_distractors, index=index,
                                     search_params=search_params, gpus=gpus)
        if dry_run:
            _, plan = score.plan_all(model, data, tuple(tasks or ()), results, options, choices=choices,
                                     overwrite=overwrite, say=console.say)
            typer.echo(json.dumps(plan.as_dict(), indent=2) if as_json else plan.text())
            return
        plan, found, failed = score.score_all(model, data, tuple(tasks or ()), results, options, choices=choices,
                                              overwrite=overwrite, console=console)
    if rank():
        return
    summary = score.SuiteSummary(plan, found, failed, results)
    typer.echo(json.dumps(summary.as_dict(), indent=2) if as_json else summary.text())
    if failed:
        raise typer.Exit(1)
