"""One benchmark or all of them for a MODEL: from strings to records, the functions behind `patchssl eval`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from patchssl.data.open import open_images, open_pair, split_names
from patchssl.eval.cache import FeatureCache
from patchssl.eval.cells import TaskOptions
from patchssl.eval.copydays import evaluate_copydays
from patchssl.eval.faiss import IndexPlan
from patchssl.eval.knn import evaluate_knn, evaluate_pixels
from patchssl.eval.linear.task import evaluate_linear
from patchssl.eval.patches import evaluate_patches
from patchssl.eval.records import Result, read_results
from patchssl.eval.revisited.task import evaluate_revisited
from patchssl.eval.suite import TASKS, ComputeOptions, SuitePlan, plan_suite, run_suite
from patchssl.models.backbone import Backbone
from patchssl.models.load import open_model
from patchssl.models.pixels import PIXEL_SIDE, RawPixels, is_pixels, open_matched, pixels_size
from patchssl.runtime.console import LOOK, Console
from patchssl.runtime.device import default_device
from patchssl.runtime.distributed import join_launched, local_rank, rank
from patchssl.runtime.errors import UsageError

PERCENT_OF = {"top1@20": "20-NN top-1", "top5@20": "top-5", "top1": "top-1", "top5": "top-5",
              "strong/map": "strong mAP", "overall/muap": "pooled µAP",
              "easy/map": "easy mAP", "medium/map": "medium mAP", "hard/map": "hard mAP",
              "exact": "exact matches", "within1": "within one patch", "pixels/exact": "exact by raw pixels",
              "position/exact": "by place alone", "chance/exact": "by chance"}


def make_options(device: str | None, batch_size: int, workers: int, *, cached: bool = True) -> ComputeOptions:
    """How features are computed, from what the command line says; UsageError for a device that is not there.

    Started by torchrun, the processes find each other here and deal the images among themselves.
    """
    chosen = default_device(device)
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", local_rank())  # every process its own GPU
    join_launched(chosen.type)
    return ComputeOptions(chosen, batch_size, workers, FeatureCache() if cached else None)


def make_choices(distractors: Path | None, whitening: Path | None, revisited_distractors: Path | None, *, index: str,
                 search_params: str, gpus: str) -> TaskOptions:
    """What `eval all` runs its benchmarks with, from what the command line says."""
    return TaskOptions(distractors, whitening, revisited_distractors, IndexPlan(index, search_params, gpus))


def open_scored(model: str | Backbone, options: ComputeOptions, say: Callable[[str], None]) -> Backbone:
    """The backbone that `model` names, or raw pixels."""
    if isinstance(model, Backbone):
        return model
    return RawPixels(pixels_size(model) or PIXEL_SIDE) if is_pixels(model) else open_model(model, options.device, say)


def score_linear(model: str, data: str, protocol: str | None, options: ComputeOptions, *, epochs: int | None = None,
                 seed: int = 0, results: Path, console: Console) -> Result:
    """The linear probe; `dino` keeps a checkpoint per epoch below `results` and goes on from it."""
    backbone = open_scored(model, options, console.say)
    train, val = open_pair(data)
    for images in (train, val):
        console.say(images.describe())
    return evaluate_linear(backbone, train, val, protocol, epochs=epochs, seed=seed, device=options.device,
                           batch_size=options.batch_size, workers=options.workers, cache=options.cache,
                           progress=console.counter("linear"), check_progress=console.counter(LOOK),
                           checkpoint_folder=results / "linear-checkpoints")


def score_copydays(model: str, data: Path, protocol: str | None, options: ComputeOptions, *, ranks: int | None = None,
                   distractors: Path | None, whitening: Path | None, console: Console) -> Result:
    """Copy detection on the set below `data`."""
    backbone = open_scored(model, options, console.say)
    return evaluate_copydays(backbone, data, protocol, ranks=ranks, distractors=distractors, whitening=whitening,
                             device=options.device, batch_size=options.batch_size, workers=options.workers,
                             cache=options.cache, progress=console.counter("features"),
                             check_progress=console.counter(LOOK), say=console.say)


def score_revisited(model: str, data: Path, set_name: str, protocol: str | None, options: ComputeOptions, *,
                    distractors: Path | None, allow_truncated: bool, console: Console) -> Result:
    """Retrieval on the revisited set `set_name` below `data`."""
    backbone = open_scored(model, options, console.say)
    return evaluate_revisited(backbone, data, set_name, protocol, distractors=distractors,
                              allow_truncated=allow_truncated, device=options.device,
                              batch_size=options.batch_size, workers=options.workers, cache=options.cache,
                              progress=console.counter("features"),
                              check_progress=console.counter(LOOK), say=console.say)


def score_patches(model: str, data: str, protocol: str | None, options: ComputeOptions, *, pairs: int = 1,
                  seed: int = 0,
                  console: Console) -> Result:
    """Patch correspondence on the val images of `data`, or all where nothing is split; labels are not needed.

    `pixels?img_size=64&patch_size=8` scores raw pixels at the sizes of another model.
    """
    backbone = open_matched(model, options.device, console.say)
    images = open_images(data, "val" if "val" in split_names(data) else None)
    console.say(images.describe())
    return evaluate_patches(backbone, images, protocol, pairs=pairs, seed=seed, device=options.device,
                            batch_size=options.batch_size, workers=options.workers,
                            progress=console.counter("patches"), check_progress=console.counter(LOOK))


def plan_all(model: str | Backbone, data: str, tasks: Sequence[str], results: Path | None, options: ComputeOptions, *,
             choices: TaskOptions | None = None, overwrite: bool,
             say: Callable[[str], None]) -> tuple[Backbone, SuitePlan]:
    """The backbone and what `eval all` would do with it; see `plan_suite`."""
    backbone = open_scored(model, options, say)
    return backbone, plan_suite(backbone, data, tasks or TASKS, results, options, choices=choices, overwrite=overwrite)


def score_all(model: str, data: str, tasks: Sequence[str], results: Path, options: ComputeOptions, *,
              choices: TaskOptions | None = None, overwrite: bool,
              console: Console) -> tuple[SuitePlan, list[Result], dict[str, str]]:
    """Everything that can be run and has no record yet, each record written as soon as it is there."""
    backbone, plan = plan_all(model, data, tasks, results, options, choices=choices, overwrite=overwrite,
                              say=console.say)
    found, failed = run_suite(backbone, plan, options, console=console,
                              keep=lambda result: None if rank() else result.write(results))
    return plan, found, failed


@dataclass(frozen=True)
class SuiteSummary:
    """What `eval all` did: records of this run and of earlier ones, and what failed."""

    plan: SuitePlan
    found: Sequence[Result]
    failed: Mapping[str, str]
    results: Path

    def as_dict(self) -> dict[str, Any]:
        """For machines: the records of what the plan names, and what failed."""
        return {**self.plan.as_dict(), "records": [result.as_dict() for result in self.records()],
                "failed": dict(self.failed)}

    def records(self) -> list[Result]:
        """Records of this run, and those of what was done already; what failed has none, whatever lies there of old."""
        kept, _ = read_results(self.results) if self.results.is_dir() else ([], [])
        known = {(cell.weights, *cell.key()) for cell in self.plan.done}
        known |= {(record.weights_sha256, *_key(record)) for record in self.found}
        return [record for record in kept if (record.weights_sha256, *_key(record)) in known]

    def text(self) -> str:
        """A table of the main numbers, what was left out, and what failed."""
        rows = [(record.task, record.dataset, record.protocol, label, f"{record.metrics[name]:.1%}")
                for record in self.records() for name, label in PERCENT_OF.items() if name in record.metrics]
        table = pd.DataFrame(rows, columns=["task", "data set", "protocol", "metric", "value"]).to_string(index=False)
        notes = [f"left out: {what}: {why}" for what, why in self.plan.left_out.items()]
        notes += [f"failed: {what}: {why}" for what, why in self.failed.items()]
        return "\n".join([table, *notes])


def evaluate(model: str | Backbone, data: str | Path, tasks: Sequence[str] = ("knn",), *, device: str | None = None,
             cached: bool = True) -> Any:
    """Score `model` (a URI or a backbone) on `data` by each of `tasks`: a pandas DataFrame, one row per metric.

    Columns: model, task, dataset, protocol, metric, value (a fraction). `data` is a set, or a folder of sets; tasks
    are knn, linear, copydays, revisited, patches. Raises UsageError for an unknown task, DataError where nothing can be
    run, and the first error of a task that fails.
    """
    options = make_options(device, 64, 0, cached=cached)
    backbone, plan = plan_all(model, str(data), tuple(tasks), None, options, overwrite=True, say=lambda sentence: None)
    results, _ = run_suite(backbone, plan, options, stop_at_errors=True)
    rows = [{"model": result.model, "task": result.task, "dataset": result.dataset, "protocol": result.protocol,
             "metric": metric, "value": value} for result in results for metric, value in result.metrics.items()]
    return pd.DataFrame(rows, columns=["model", "task", "dataset", "protocol", "metric", "value"])


def headline(result: Result) -> str:
    """The main numbers of a record in percent: mine on textures, protocol native: 20-NN top-1 22.3%, top-5 67.0%."""
    intervals = result.detail.get("interval95", {})
    shown = [f"{label} {result.metrics[name]:.1%}{_between(intervals.get(name))}" for name, label in PERCENT_OF.items()
             if name in result.metrics]
    for name, facts in result.detail.get("fewshot", {}).items():
        spread = f" ± {facts['deviation']:.1%}" if facts["deviation"] is not None else ""
        shown.append(f"{name} {result.metrics[name]:.1%}{spread} ({facts['draws']} draws)")
    chosen = result.detail.get("selection", {})
    if "best_epoch" in chosen:
        shown.append(f"{chosen['by']} {chosen['best_epoch']} of {chosen['epochs']}")
    return f"{result.model} on {result.dataset}, protocol {result.protocol}: {', '.join(shown)}"


def _between(interval: Sequence[float] | None) -> str:
    return f" (95 % interval {interval[0]:.1%} to {interval[1]:.1%})" if interval else ""


def _key(record: Result) -> tuple[str, str, str]:
    """What `Cell.key` says of the benchmark that made `record`."""
    return record.dataset, record.protocol_fingerprint, record.task


def score_knn(model: str | Backbone, data: str, protocol: str | None = None, *, device: str | None = None,
              batch_size: int = 64, workers: int = 2, console: Console | None = None,
              cache: FeatureCache | None = None, **variant: Any) -> Result:
    """k-NN of the backbone `model`, or of raw pixels (`pixels`, `pixels?img_size=32`), on train and val of `data`.

    `variant` are the shots, draws, seed, index, search_params and gpus of `evaluate_knn`.
    """
    chosen = default_device(device)
    of_pixels = is_pixels(model)
    if of_pixels and protocol not in (None, "native"):
        raise UsageError(f"raw pixels are scored under the protocol native, not {protocol}")
    image_size = pixels_size(str(model)) if of_pixels else None
    say = console.say if console else (lambda sentence: None)
    backbone = open_model(model, chosen, say) if isinstance(model, str) and not of_pixels else model
    train, val = open_pair(data)
    say(train.describe())
    say(val.describe())
    progress, look = (console.counter("features"), console.counter(LOOK)) if console else (None, None)
    if isinstance(backbone, str):
        return evaluate_pixels(train, val, image_size, progress=progress, check_progress=look, **variant)
    return evaluate_knn(backbone, train, val, protocol, batch_size=batch_size, workers=workers, progress=progress,
                        check_progress=look, search_progress=console.counter("search") if console else None,
                        cache=cache, **variant)
