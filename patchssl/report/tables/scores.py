"""From result records to scores: which are the same thing with another seed, and how sure the mean is.

A score belongs to one row (method, architecture, pretraining) and one column (dataset, protocol, metric).
Datasets and protocols are told apart by their fingerprints: numbers that cannot be compared never share a
column.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from patchssl.eval.metrics import wilson_interval
from patchssl.eval.records import Result
from patchssl.eval.tasks import table_metrics
from patchssl.report.tables.stats import per_query, t_interval
from patchssl.runtime.errors import UsageError, unknown_choice

# rows in this order; a method that is not named here comes last, under its model's name
METHODS: dict[str, str] = {
    "chance": "Chance",
    "position": "Position only",
    "pixels": "Raw pixels",
    "random": "Random network",
    "dino": "DINO",
    "pwself": "PW-Self",
    "ibot": "iBOT",
    "supervised": "Supervised",
}
REFERENCES = ("chance", "position", "pixels")  # answers that records of patches hold beside their network's
NO_NETWORK = set(REFERENCES)
NONE = "–"
_FEW_SHOT = re.compile(r"fewshot([1-9][0-9]{0,8})/top1@[0-9]+")


class Row(NamedTuple):
    """What was scored; records that differ in their weights alone share a row."""

    order: int
    label: str
    arch: str
    pretraining: str


class Column(NamedTuple):
    """What it was scored on, how, and which metric."""

    task: str
    dataset: str
    protocol: str
    metric: str
    dataset_fingerprint: str
    protocol_fingerprint: str


@dataclass(frozen=True)
class Score:
    """Mean of one cell over `n` records, a fraction in [0, 1], with its 95 % interval if there is one.

    Of one few-shot record `low` and `high` are the mean minus and plus the deviation over its draws instead.
    """

    row: Row
    column: Column
    mean: float
    n: int
    low: float | None = None
    high: float | None = None
    # "seeds": Student's t over records; of one record "images": Wilson over test images, "queries": t, and "draws"
    interval: str = ""
    seeds_differ: bool = True  # False where records share a seed or do not state it
    draws: int = 0  # of the training images, in one few-shot record
    records: tuple[Result, ...] = field(default=(), repr=False, compare=False)  # one per weights, by ascending value


def collect_scores(results: Iterable[Result], task: str) -> list[Score]:
    """Scores of all records of `task`, in the order of the tables; UsageError for an unknown task."""
    if task not in (known := table_metrics()):
        raise UsageError(unknown_choice("task", task, known))
    scores = scores_of(results, task, lambda metric: metric_place(task, metric) is not None)
    return sorted(scores, key=lambda s: (s.row, column_order(s.column)))


def scores_of(results: Iterable[Result], task: str, wanted: Callable[[str], bool]) -> list[Score]:
    """Scores of all records of `task` under every metric that is `wanted`, whether tables show it or not."""
    cells: dict[tuple[Row, Column], list[Result]] = defaultdict(list)
    found = sorted((result for result in results if result.task == task), key=_sort_key)
    for result in [*found, *_references(found)]:
        for metric in result.metrics:
            if wanted(metric):
                cells[row_of(result), column_of(result, metric)].append(result)
    return [_score(row, column, records) for (row, column), records in cells.items()]


def _references(results: Sequence[Result]) -> list[Result]:
    """What no network says: of each column's first record, its numbers for answers by chance, by position, by pixels.

    Pixels that were run by themselves have a record with detail and are left to it.
    """
    columns: dict[Column, Result] = {}
    for result in results:
        columns.setdefault(column_of(result, ""), result)
    measured = {column_of(result, "") for result in results if result.method == "pixels"}
    made = []
    for column, result in columns.items():
        for source in REFERENCES:
            metrics = {name: result.metrics[f"{source}/{name}"] for name in table_metrics()["patches"]
                       if f"{source}/{name}" in result.metrics}
            if column.task == "patches" and metrics and not (source == "pixels" and column in measured):
                made.append(replace(result, model=source, method=source, metrics=metrics, detail={}))
    return made


def metric_place(task: str, metric: str) -> int | None:
    """Where the tables of `task` show `metric`: its headlines, then few shots by their number; None: nowhere.

    >>> [metric_place("knn", name) for name in ("top1@20", "fewshot5/top1@20", "top1@10")]
    [0, 7, None]
    """
    shown = table_metrics()[task]
    if metric in shown:
        return shown.index(metric)
    shots = few_shots(metric)
    return len(shown) + shots if task == "knn" and shots is not None else None


def few_shots(metric: str) -> int | None:
    """The 5 of fewshot5/top1@20, None for other metrics."""
    found = _FEW_SHOT.fullmatch(metric)
    return int(found[1]) if found else None


def column_order(column: Column) -> tuple[Any, ...]:
    """What columns are sorted by: task, dataset and protocol, then the metric's place, then its name."""
    return (*column._replace(metric=""), metric_place(column.task, column.metric), column.metric)


def row_of(result: Result) -> Row:
    """The row that a record belongs to."""
    known = list(METHODS)
    order = known.index(result.method) if result.method in METHODS else len(known)
    label = METHODS.get(result.method, result.variant or result.model)
    if result.variant and label != result.variant:
        label = variant_label(result.method, result.variant)
    arch = NONE if result.method in NO_NETWORK else result.arch or NONE
    return Row(order, label, arch, _pretraining(result))


def variant_label(method: str, variant: str) -> str:
    """What the tables call a `variant` of `method`.

    >>> variant_label("pwself", "pwself"), variant_label("pwself", "pwself-random-matches")
    ('PW-Self', 'PW-Self (random-matches)')
    """
    name, own = METHODS.get(method, method), variant.removeprefix(method).lstrip("-")
    return f"{name} ({own})" if own else name


def column_of(result: Result, metric: str) -> Column:
    """The column that `metric` of a record belongs to."""
    return Column(result.task, result.dataset, result.protocol, metric, result.dataset_fingerprint,
                  result.protocol_fingerprint)


def _pretraining(result: Result) -> str:
    if result.method in NO_NETWORK:
        return NONE
    if result.method == "random":
        return "untrained"
    if not result.pretrain_data:
        return "not stated"
    if result.pretrain_epochs is None:
        return f"{result.pretrain_data}, epochs not stated"
    plural = "" if result.pretrain_epochs == 1 else "s"
    return f"{result.pretrain_data}, {result.pretrain_epochs:g} epoch{plural}"


def _score(row: Row, column: Column, records: Sequence[Result]) -> Score:
    """One cell; the same weights scored twice, perhaps under two names, count once."""
    distinct = list({record.weights_sha256: record for record in reversed(records)}.values())
    distinct.sort(key=lambda record: (record.metrics[column.metric], record.weights_sha256))
    score = partial(Score, row, column, n=len(distinct), records=tuple(distinct))
    values = [record.metrics[column.metric] for record in distinct]
    mean = math.fsum(values) / len(values)
    if len(values) > 1:
        seeds = [r.seed for r in distinct]
        known = None not in seeds and len(set(seeds)) == len(seeds)
        low, high = t_interval(values)
        return score(mean=mean, low=low, high=high, interval="seeds", seeds_differ=known)
    if (spread := _draws(distinct[0], column.metric)) is not None:
        deviation, draws = spread
        return score(mean=mean, low=mean - deviation, high=mean + deviation, interval="draws", draws=draws)
    count = num_test_images(distinct[0])
    if count and column.metric.startswith("top"):
        low, high = wilson_interval(round(mean * count), count)
        return score(mean=mean, low=low, high=high, interval="images")
    queries = per_query(distinct[0], column.metric)
    if queries is not None and (~np.isnan(queries)).sum() > 1:
        low, high = t_interval(queries[~np.isnan(queries)].tolist())
        return score(mean=mean, low=max(low, 0.0), high=min(high, 1.0), interval="queries")
    return score(mean=mean)


def num_test_images(result: Result) -> int | None:
    """How many test images an accuracy was counted on, if the record says so."""
    count = result.detail.get("num_test")
    return count if isinstance(count, int) and count > 0 else None


def _draws(result: Result, metric: str) -> tuple[float, int] | None:
    """The deviation of a few-shot `metric` over the draws, and how many they were, if the record says so."""
    few = result.detail.get("fewshot")
    facts = few.get(metric) if isinstance(few, dict) else None
    if not isinstance(facts, dict):
        return None
    deviation, draws = facts.get("deviation"), facts.get("draws")
    if not isinstance(deviation, int | float) or not isinstance(draws, int) or not 0 <= deviation <= 1:
        return None
    return float(deviation), draws


def _sort_key(result: Result) -> tuple[Any, ...]:
    return (result.model, result.weights_sha256, result.dataset, result.protocol_fingerprint,
            str(result.seed), sorted(result.metrics.items()))
