"""From result records to scores: which are the same thing with another seed, and how sure the mean is.

A score belongs to one row (method, architecture, pretraining) and one column (dataset, protocol, metric).
Datasets and protocols are told apart by their fingerprints: numbers that cannot be compared never share a
column.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """What was scored; networks that are known to differ in their seed alone share a row."""

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
    alone: bool = False  # in a row of its own, though others of its method are not known to differ but in the seed
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
    apart, network = _rows_apart(found), _networks(found)
    for result in [*found, *_references(found)]:
        row = apart.get((row_of(result), network(result)), row_of(result))
        for metric in result.metrics:
            if wanted(metric) and not _is_sure(result, metric):
                cells[row, column_of(result, metric)].append(result)
    alone = {*apart.values()}
    return [replace(_score(row, column, records), alone=row in alone) for (row, column), records in cells.items()]


def _rows_apart(results: Sequence[Result]) -> dict[tuple[Row, str], Row]:
    """Rows of their own for networks that would share a cell, and state no seed or that of another.

    What they differ in is not known: a mean over them would be that of nothing, and its interval would be wrong.
    """
    known = _networks(results)
    cells: dict[tuple[Row, Column], dict[str, Result]] = defaultdict(dict)
    for result in results:
        if result.method not in NO_NETWORK:
            cells[row_of(result), column_of(result, "")].setdefault(known(result), result)
    found = {}
    for (row, _), networks in cells.items():
        seeds = Counter(result.seed for result in networks.values())
        unsure = {key: result for key, result in networks.items() if result.seed is None or seeds[result.seed] > 1}
        if len(networks) > 1:
            for key, name in _names(unsure).items():
                found[row, key] = row._replace(label=name if row.label in name else f"{row.label}, {name}")
    return found


def _names(networks: Mapping[str, Result]) -> dict[str, str]:
    """What tells `networks` apart: their model's name, with digits of the weights or more of them where needed."""
    ways: list[Callable[[str, Result], str]] = [
        lambda _, result: result.model, lambda _, result: f"{result.model} {result.network.key[:8]}",
        lambda key, result: f"{result.model} {result.network.key[:8]}-{key[:8]}",
        lambda key, result: f"{result.model} {key}"]
    told = ({key: way(key, result) for key, result in networks.items()} for way in ways)
    return next(names for names in told if len({*names.values()}) == len(names))


def _networks(results: Iterable[Result]) -> Callable[[Result], str]:
    """What tells the network of each record; an older one, which knows the weights alone, is of one that has them."""
    known = {result.network.weights: result.network.sha256 for result in results if result.network.sha256}

    def network(result: Result) -> str:
        own = result.network
        return own.sha256 or known.get(own.weights) or own.weights

    return network


def _is_sure(result: Result, metric: str) -> bool:
    """Is `metric` a top-5 among five classes or fewer, as older records have it: right whatever was scored?"""
    classes = result.detail.get("class_accuracy")
    return (metric.startswith("top5") and result.network.sha256 is None and isinstance(classes, dict)
            and len(classes) <= 5 and result.metrics[metric] == 1)


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
    """One cell; a network scored twice, perhaps under two names, counts once."""
    distinct = _one_of_each(records)
    distinct.sort(key=lambda record: (record.metrics[column.metric], record.weights_sha256))
    score = partial(Score, row, column, n=len(distinct), records=tuple(distinct))
    values = [record.metrics[column.metric] for record in distinct]
    mean = math.fsum(values) / len(values)
    if len(values) > 1:
        low, high = t_interval(values)
        return score(mean=mean, low=low, high=high, interval="seeds")
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


def _one_of_each(records: Sequence[Result]) -> list[Result]:
    """One record per network, of those of one the newest in kind, then the first."""
    network = _networks(records)
    older, newer = ([r for r in records if bool(r.network.sha256) == new] for new in (False, True))
    return [*{record.method if record.method in NO_NETWORK else network(record): record
              for record in (*reversed(older), *reversed(newer))}.values()]


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
