"""`patchssl eval ...`: a backbone under named protocols. One command for each task of the registry, and one for all."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

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
    echo,
    not_empty,
    print_record,
    scoring_console,
)
from patchssl.eval.tasks import Task, all_tasks, default_tasks

AnyRecord = Any  # its class would import torch
Scoring = Callable[..., AnyRecord]  # score(data, protocol, **options) of the model that the command was given


def shared_options(*, cached: bool = True) -> Callable[[Callable[..., AnyRecord]], Callable[..., None]]:
    """A command of `function(model, data, score, ...)` that also takes what all benchmarks share.

    `score(data, protocol, **options)` opens the model, scores it and gives the record, which is written and printed.
    Options that all have: --results, --device, --batch-size, --workers, --json, and --cache where features are kept.
    """
    def decorate(function: Callable[..., AnyRecord]) -> Callable[..., None]:
        def command(*, model: str, results: Path, device: str | None, batch_size: int | None, workers: int,
                    as_json: bool, use_cache: bool = False, **own: Any) -> None:
            from patchssl.eval.score import make_options, score_task

            with scoring_console() as console:
                compute = make_options(device, batch_size, workers, cached=use_cache, progress=console)
                result = function(score=functools.partial(score_task, function.__name__, model, compute=compute),
                                  results=results, **own)
            print_record(result, results, as_json)

        keyword = inspect.Parameter.KEYWORD_ONLY
        own = [parameter.replace(kind=keyword) for name, parameter in inspect.signature(
            function, eval_str=True).parameters.items() if name not in ("score", "results")]
        common: dict[str, tuple[Any, Any]] = {
            "results": (ResultsOpt, Path("results")), "device": (DeviceOpt, None), "batch_size": (BatchOpt, None),
            "workers": (WorkersOpt, 2), **({"use_cache": (CacheOpt, True)} if cached else {}),
            "as_json": (JsonOpt, False)}
        parameters = [inspect.Parameter("model", keyword, annotation=ModelArg), *own,
                      *(inspect.Parameter(name, keyword, default=default, annotation=annotation)
                        for name, (annotation, default) in common.items())]
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def protocol_option(task: str, default: str) -> Any:
    """`--protocol` with the names that `task` has."""
    return typer.Option("--protocol", help=f"{_listed(all_tasks()[task].protocols)}; {default}")


def _listed(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


_USUAL = "default: dino for models trained at 224 px, else native."
KnnProtocol = Annotated[str | None, protocol_option("knn", _USUAL)]
LinearProtocol = Annotated[str | None, protocol_option("linear", "dino trains 100 epochs. Default: cached for models "
                                                                 "trained at 224 px, else native.")]
CopydaysProtocol = Annotated[str | None, protocol_option("copydays", _USUAL)]
RevisitedProtocol = Annotated[str | None, protocol_option("revisited", _USUAL)]
PatchesProtocol = Annotated[str | None, protocol_option("patches", "the only one.")]


@shared_options()
def knn(
    score: Scoring, results: Path, data: DataOpt, protocol: KnnProtocol = None,
    shots: Annotated[list[int] | None, typer.Option("--shots", min=1, help="Also score with so many training images "
                                                                             "per class; may be given several times."
                                                    )] = None,
    draws: Annotated[int, typer.Option("--draws", min=1, help="How often --shots draws its images.")] = 5,
    seed: SeedOpt = 0, index: IndexOpt = "Flat", search_params: SearchParamsOpt = "", gpus: GpusOpt = "one",
) -> AnyRecord:
    """k-NN classification on frozen features: vote of the nearest training images."""
    return score(data, protocol, shots=tuple(shots or ()), draws=draws, seed=seed, index=index,
                 search_params=search_params, gpus=gpus)


@shared_options()
def linear(
    score: Scoring, results: Path, data: DataOpt, protocol: LinearProtocol = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Instead of the protocol's own number; "
                                                                              "another protocol, such as "
                                                                              "dino-10-epochs.")] = None,
    seed: SeedOpt = 0,
) -> AnyRecord:
    """Linear classifiers on frozen features, with a 95 % interval."""
    return score(data, protocol, epochs=epochs, seed=seed, checkpoint_folder=results / "linear-checkpoints")


@shared_options()
def copydays(
    score: Scoring, results: Path, data: FolderOpt, protocol: CopydaysProtocol = None,
    ranks: Annotated[int | None, typer.Option("--ranks", min=1, help="How many results count, for a set too small "
                                                                           "for the protocol's 20 (sscd: 100); another "
                                                                           "protocol, as native-12-ranks.")] = None,
    distractors: DistractorsOpt = None, whitening: WhiteningOpt = None,
) -> AnyRecord:
    """Copy detection on Copydays, or a set in its layout: mAP of all 20 blocks."""
    return score(data, protocol, ranks=ranks, distractors=distractors, whitening=whitening)


@shared_options()
def revisited(
    score: Scoring, results: Path, data: FolderOpt,
    set_name: Annotated[str, typer.Option("--set", help="roxford5k, rparis6k, or the NAME of gnd_NAME.pkl.")],
    protocol: RevisitedProtocol = None,
    distractors: Annotated[Path | None, typer.Option("--distractors", help="Folder of images that join the database, "
                                                                              "such as revisitop1m.")] = None,
    allow_truncated: Annotated[bool, typer.Option("--allow-truncated", help="Read files that end early, as the "
                                                                              "official code does.")] = False,
) -> AnyRecord:
    """Retrieval on revisited Oxford and Paris, or a set in their layout: easy, medium, hard."""
    return score(data, protocol, set_name=set_name, distractors=distractors, allow_truncated=allow_truncated)


@shared_options(cached=False)
def patches(
    score: Scoring, results: Path,
    data: Annotated[str, typer.Option("--data", callback=not_empty, help="Folder of images, labels not needed, or a "
                                                                          "set's name; its val images if it has "
                                                                          "them.")],
    protocol: PatchesProtocol = None,
    pairs: Annotated[int, typer.Option("--pairs", min=1, help="Pairs of views per image.")] = 1, seed: SeedOpt = 0,
) -> AnyRecord:
    """Patch correspondence: how often a patch finds its place in another view, beside raw pixels and chance."""
    return score(data, protocol, pairs=pairs, seed=seed)


def plain_command(task: Task) -> Callable[..., None]:
    """The command of a task that has no options of its own."""
    def command(score: Scoring, results: Path, data: DataOpt, protocol: str | None = None) -> AnyRecord:
        return score(data, protocol)

    command.__name__ = task.name
    command.__doc__ = f"{next(iter(task.titles.values()))}: needs {task.needs}."
    option = protocol_option(task.name, "default: the task's own.")
    command.__annotations__ = {"data": DataOpt, "protocol": Annotated[str | None, option]}
    return shared_options()(command)


def eval_all(
    model: ModelArg,
    data: Annotated[str, typer.Option("--data", callback=not_empty, help="A set, or a folder of sets side by side.")],
    tasks: Annotated[list[str] | None, typer.Option("--task", help=f"{_listed(tuple(all_tasks()))}; may be given "
                                                                     "several times. Default: "
                                                                     f"{', '.join(default_tasks())}.")] = None,
    results: ResultsOpt = Path("results"),
    overwrite: Annotated[bool, typer.Option("--overwrite/--skip-existing", help="Run again what has a record, or only "
                                                                                  "what is missing.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print plan, images, time; run nothing.")] = False,
    distractors: DistractorsOpt = None,
    whitening: WhiteningOpt = None,
    revisited_distractors: Annotated[Path | None, typer.Option(
        "--revisited-distractors", help="Folder of images, such as revisitop1m, that join the database of every "
                                        "revisited set, for records of their own beside those without.")] = None,
    index: IndexOpt = "Flat", search_params: SearchParamsOpt = "", gpus: GpusOpt = "one",
    device: DeviceOpt = None, batch_size: BatchOpt = None, workers: WorkersOpt = 2, as_json: JsonOpt = False,
) -> None:
    """Every benchmark that the data there allows and that has no record yet; one table at the end."""
    from patchssl.eval import score
    from patchssl.runtime.distributed import rank

    with scoring_console() as console:
        compute = score.make_options(device, batch_size, workers, progress=console)
        choices = score.make_choices(distractors, whitening, revisited_distractors, index=index,
                                     search_params=search_params, gpus=gpus)
        if dry_run:
            _, plan = score.plan_all(model, data, tasks or (), results, compute, choices=choices, overwrite=overwrite)
            echo(json.dumps(plan.as_dict(), indent=2) if as_json else plan.text())
            return
        plan, found, failed = score.score_all(model, data, tasks or (), results, compute, choices=choices,
                                              overwrite=overwrite)
    if rank():
        return
    summary = score.SuiteSummary(plan, found, failed, results)
    echo(json.dumps(summary.as_dict(), indent=2) if as_json else summary.text())
    if failed:
        raise typer.Exit(1)


def eval_app() -> typer.Typer:
    """The group `eval`: a command of its own for each built-in task, a plain one for every other."""
    app = typer.Typer(no_args_is_help=True, help="Score a backbone under a named protocol.")
    own = {"knn": knn, "linear": linear, "copydays": copydays, "revisited": revisited, "patches": patches}
    for name, task in all_tasks().items():
        app.command(name)(own.get(name) or plain_command(task))
    app.command("all")(eval_all)
    return app
