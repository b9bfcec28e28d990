"""Variants of a method over the same seeds: means, differences paired by seed, and what equal time makes of them.

Pure functions of records and of the logs of runs; values are fractions in [0, 1].
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import NamedTuple

import numpy as np

from patchssl.eval.records import Result
from patchssl.eval.tasks import study_measures
from patchssl.report.tables.stats import t_interval, t_test_p
from patchssl.runtime.progress import LogRows

EQUAL_IMAGES, EQUAL_TIME = "k-NN in training, equal images", "k-NN in training, equal time"
Values = Mapping[str, Mapping[int, float]]  # by variant and seed


class Mean(NamedTuple):
    """Of n seeds, with the 95 % t-interval where n is two or more; written in percent."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        half = "" if self.high is None else f" ± {100 * (self.high - self.mean):.1f}"
        return f"{100 * self.mean:.1f}{half} (n = {self.n})"


class Paired(NamedTuple):
    """Mean difference over the n seeds both sides have, its 95 % t-interval, the t-test's p-value; in points."""

    mean: float
    low: float | None
    high: float | None
    p: float | None
    n: int

    def __str__(self) -> str:
        between = "" if self.low is None or self.high is None else f" [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"
        return f"{100 * self.mean:+.1f}{between} (n = {self.n})"


@dataclass(frozen=True)
class Measure:
    """One number per variant and seed; all of one task, dataset and protocol."""

    title: str
    task: str
    dataset: str
    protocol: str
    metric: str
    values: Values


@dataclass(frozen=True)
class Pace:
    """What a variant's training costs: seconds per image (median over the log rows of all its runs)."""

    seconds_per_image: float
    images: int  # of a whole run
    images_in_time: float  # that fit into the time of the variant whose whole run takes the least
    whole: bool  # is that the whole run?


def mean_over_seeds(values: Mapping[int, float]) -> Mean | None:
    """Mean of `values` (seed -> value); None where there are none."""
    if not values:
        return None
    low, high = t_interval([*values.values()]) if len(values) > 1 else (None, None)
    return Mean(fmean(values.values()), low, high, len(values))


def paired_over_seeds(first: Mapping[int, float], second: Mapping[int, float]) -> Paired | None:
    """`second` minus `first`, both seed -> value, over the seeds that both have; None where there are none.

    >>> found = paired_over_seeds({0: 0.1, 1: 0.2, 2: 0.3, 9: 0.9}, {0: 0.2, 1: 0.4, 2: 0.6})
    >>> round(found.mean, 3), round(found.low, 3), round(found.high, 3), found.n
    (0.2, -0.048, 0.448, 3)
    """
    gaps = [second[seed] - first[seed] for seed in sorted({*first} & {*second})]
    if not gaps:
        return None
    if len(gaps) < 2:
        return Paired(gaps[0], None, None, None, 1)
    low, high = t_interval(gaps)
    return Paired(fmean(gaps), low, high, t_test_p(gaps), len(gaps))


def measures_of(records: Iterable[Result]) -> list[Measure]:
    """What `records` of variants and seeds measured, in the order of study_measures()."""
    titles = study_measures()
    found: dict[tuple[str, ...], dict[str, dict[int, float]]] = {}
    for record in sorted(records, key=lambda record: (record.variant or "", record.seed or 0)):
        for (task, metric) in titles:
            if record.task == task and metric in record.metrics and record.variant and record.seed is not None:
                key = (task, metric, record.dataset, record.protocol, record.dataset_fingerprint,
                       record.protocol_fingerprint)
                found.setdefault(key, {}).setdefault(record.variant, {})[record.seed] = record.metrics[metric]
    order = list(titles)
    return [Measure(titles[key[0], key[1]], key[0], key[2], key[3], key[1], found[key])
            for key in sorted(found, key=lambda key: (order.index((key[0], key[1])), key))]


def paces_of(logs: Mapping[str, Mapping[int, LogRows]], batch_sizes: Mapping[str, int],
             further: Collection[str] = ()) -> dict[str, Pace]:
    """What training costs by variant; `logs` are the rows of whole runs, by variant and seed.

    Equal time is that of the cheapest variant, which is none of the `further` ones where there are others.
    The median forgives the stretches in which a machine did something else, or a run was stopped.
    """
    seconds, images = {}, {}
    for variant, runs in logs.items():
        rates = [row["images_per_second"] for rows in runs.values() for row in rows if row["images_per_second"] > 0]
        if rates:
            seconds[variant] = 1 / median(rates)
            images[variant] = batch_sizes[variant] * max(rows[-1]["step"] for rows in runs.values() if rows)
    if not seconds:
        return {}
    time = min(seconds[variant] * images[variant] for variant in {*seconds} - {*further} or seconds)
    return {variant: Pace(seconds[variant], images[variant], min(images[variant], time / seconds[variant]),
                          time >= seconds[variant] * images[variant]) for variant in seconds}


def curve_measures(logs: Mapping[str, Mapping[int, LogRows]], paces: Mapping[str, Pace],
                   batch_sizes: Mapping[str, int]) -> list[Measure]:
    """The in-training k-NN at the end of every run, and after as many images as fit into equal time.

    Read off the run's own curve over images, between two points in a straight line; before the first point there is
    no value.
    """
    ends: dict[str, dict[int, float]] = {}
    readings: dict[str, dict[int, float]] = {}
    for variant, pace in paces.items():
        for seed, rows in logs[variant].items():
            points = [(row["step"] * batch_sizes[variant], row["knn_top1"]) for row in rows if "knn_top1" in row]
            if not points:
                continue
            images, values = zip(*points, strict=True)
            ends.setdefault(variant, {})[seed] = values[-1]
            if pace.images_in_time >= images[0]:
                readings.setdefault(variant, {})[seed] = float(np.interp(pace.images_in_time, images, values))
    return [Measure(title, "knn in training", "", "", "knn_top1", values)
            for title, values in ((EQUAL_IMAGES, ends), (EQUAL_TIME, readings)) if values]
