"""One benchmark or all of them for a MODEL: from strings to records, the functions behind `patchssl eval`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from patchssl.eval.cache import FeatureCache
from patchssl.eval.cells import TaskOptions
from patchssl.eval.faiss import IndexPlan
from patchssl.eval.records import Result, read_results
from patchssl.eval.suite import SuitePlan, plan_suite, run_suite
from patchssl.eval.tasks import ComputeOptions, default_tasks, find_task, metric_words
from patchssl.models.backbone import Backbone
from patchssl.models.load import open_model
from patchssl.models.pixels import RawPixels
from patchssl.runtime.device import default_device
from patchssl.runtime.distributed import join_launched, local_rank, rank
from patchssl.runtime.errors import DataError
from patchssl.runtime.progress import Reporter


def make_options(device: str | None = None, batch_size: int | None = None, workers: int = 0, *, cached: bool = True,
                 progress: Reporter | None = None) -> ComputeOptions:
    """What scoring may use, from what the command line says; UsageError for a device that is not there.

    Started by torchrun, the processes find each other here and share the images among themselves.
    """
    chosen = default_device(device)
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", local_rank())  # every process its own GPU
    join_launched(chosen.type)
    return ComputeOptions(chosen, batch_size, workers, FeatureCache() if cached else None, progress)


def make_choices(distractors: Path | None, whitening: Path | None, revisited_distractors: Path | None, *, index: str,
                 search_params: str, gpus: str) -> TaskOptions:
    """What `eval all` runs its benchmarks with, from what the command line says."""
    return TaskOptions(distractors, whitening, revisited_distractors, IndexPlan(index, search_params, gpus))


def open_scored(model: str | Backbone, compute: ComputeOptions) -> Backbone:
    """The backbone that `model` names."""
    return model if isinstance(model, Backbone) else open_model(model, torch.device(compute.device or "cpu"),
                                                                compute.say)


def score_task(name: str, model: str | Backbone, data: str | Path, protocol: str | None, compute: ComputeOptions,
               **options: Any) -> Result:
    """The record of `model` in the task `name` on `data`; `options` as in the task's own evaluation."""
    return find_task(name).score(open_scored(model, compute), str(data), protocol, compute, **options)


def score_knn(model: str | Backbone, data: str, protocol: str | None = None, *, device: str | None = None,
              batch_size: int | None = None, workers: int = 2, console: Reporter | None = None,
              cache: FeatureCache | None = None, **variant: Any) -> Result:
    """k-NN of `model` (also raw pixels: `pixels`, `pixels?img_size=32`) on train and val of `data`.

    `variant` are the shots, draws, seed, index, search_params and gpus of `evaluate_knn`.
    """
    compute = ComputeOptions(default_device(device), batch_size, workers, cache, console)
    return score_task("knn", model, data, protocol, compute, **variant)


def plan_all(model: str | Backbone, data: str, tasks: Sequence[str], results: Path | None, compute: ComputeOptions, *,
             choices: TaskOptions | None = None, overwrite: bool) -> tuple[Backbone, SuitePlan]:
    """The backbone and what `eval all` would do with it; see `plan_suite`."""
    backbone = open_scored(model, compute)
    if isinstance(backbone, RawPixels):
        backbone.sized = True  # one size for all benchmarks
    return backbone, plan_suite(backbone, data, tasks or default_tasks(), results, compute, choices=choices,
                                overwrite=overwrite)


def score_all(model: str, data: str, tasks: Sequence[str], results: Path, compute: ComputeOptions, *,
              choices: TaskOptions | None = None,
              overwrite: bool) -> tuple[SuitePlan, list[Result], dict[str, str]]:
    """Everything that can be run and has no record yet, each record written as soon as it is there."""
    backbone, plan = plan_all(model, data, tasks, results, compute, choices=choices, overwrite=overwrite)
    found, failed = run_suite(backbone, plan, compute,
                              keep=lambda result: None if rank() else _keep_or_say(result, results))
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
        known = {cell.key() for cell in self.plan.done} | {_key(record) for record in self.found}
        return [record for record in kept if record.network.matches(self.plan.network) and _key(record) in known]

    def text(self) -> str:
        """A table of the main numbers, what was skipped, and what failed."""
        rows = [(record.task, record.dataset, record.protocol, label, f"{record.metrics[name]:.1%}")
                for record in self.records() for name, label in metric_words().items() if name in record.metrics]
        table = pd.DataFrame(rows, columns=["task", "data set", "protocol", "metric", "value"]).to_string(index=False)
        notes = [f"skipped: {what}: {why}" for what, why in self.plan.left_out.items()]
        notes += [f"failed: {what}: {why}" for what, why in self.failed.items()]
        return "\n".join([table, *notes])


def evaluate(model: str | Backbone, data: str | Path, tasks: Sequence[str] = ("knn",), *, device: str | None = None,
             cached: bool = True) -> Any:
    """Score `model` (a URI or a backbone) on `data` by each of `tasks`: a pandas DataFrame, one row per metric.

    Columns: model, task, dataset, protocol, metric, value (a fraction). `data` is a set, or a folder of sets; tasks
    are knn, linear, copydays, revisited, patches, and those registered with `patchssl.eval.tasks.register`. Raises
    UsageError for an unknown task, DataError where nothing can be run, and the first error of a task that fails.
    """
    compute = make_options(device, cached=cached)
    backbone, plan = plan_all(model, str(data), tuple(tasks), None, compute, overwrite=True)
    results, _ = run_suite(backbone, plan, compute, stop_at_errors=True)
    rows = [{"model": result.model, "task": result.task, "dataset": result.dataset, "protocol": result.protocol,
             "metric": metric, "value": value} for result in results for metric, value in result.metrics.items()]
    return pd.DataFrame(rows, columns=["model", "task", "dataset", "protocol", "metric", "value"])


def keep_result(result: Result, results: Path) -> Path:
    """The file of `result` below `results`; DataError where that takes none, once the record is kept elsewhere."""
    try:
        return result.write(results)
    except DataError as error:
        try:
            kept = result.write(Path(tempfile.mkdtemp(prefix="patchssl-results-")))
        except (DataError, OSError):
            raise DataError(f"{error}; its record is lost, no place was left for it") from None
        raise DataError(f"{error}; its record is kept in {kept}: free some space, and copy what is in "
                        f"{kept.parents[1]} to {results}") from None


def _keep_or_say(result: Result, results: Path) -> Path:
    """As `keep_result`, with the number in the error."""
    try:
        return keep_result(result, results)
    except DataError as error:
        raise DataError(f"{headline(result)}, but {error}") from None


def headline(result: Result) -> str:
    """The main numbers of a record in percent: mine on textures, protocol native: 20-NN top-1 22.3%, top-5 67.0%."""
    intervals = result.detail.get("interval95", {})
    shown = [f"{label} {result.metrics[name]:.1%}{_between(intervals.get(name))}"
             for name, label in metric_words().items() if name in result.metrics]
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
