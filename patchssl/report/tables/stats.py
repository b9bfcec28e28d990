"""How sure a difference is: of two networks on the same queries or test images, and of values over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from patchssl.eval.records import Result, unpack_bits
from patchssl.runtime.errors import DataError

RESAMPLES = 9_999
SIGNIFICANT = 0.05
_CLOSE = 1e-5  # APs stand in records with six digits
_NOISE = 1e-12  # sums in another order are not quite equal
_CELLS = 4_000_000  # drawn numbers in memory at a time
_FEW = 10  # different gaps whose numbers are drawn instead of the gaps
_FAR = 4.95  # standard deviations of the sum under sign flips


class Difference(NamedTuple):
    """Mean of `num` paired differences, second minus first, with its 95 % interval and two-sided p-value."""

    mean: float
    low: float
    high: float
    p: float
    num: int

    @property
    def significant(self) -> bool:
        """Is no difference ruled out, by the p-value and by the interval?"""
        return self.p < SIGNIFICANT and not self.low <= 0 <= self.high


def per_query(result: Result, metric: str) -> np.ndarray | None:
    """The values (Q,) whose mean is `metric`: 0 or 1 or a share per test image, or an AP per query; NaN: none.

    None where the record holds none, and where what it holds contradicts the metric.
    """
    try:
        values = _values(result, metric)
    except (ValueError, TypeError, KeyError, OverflowError):  # a record is a file that anyone may have written
        return None
    if values is None or values.ndim != 1 or np.isnan(values).all():
        return None
    inside = (values[~np.isnan(values)] >= 0).all() and (values[~np.isnan(values)] <= 1).all()
    return values if inside and abs(np.nanmean(values) - result.metrics[metric]) < _CLOSE else None


def query_names(result: Result, metric: str, count: int) -> list[str]:
    """What the `count` values that `per_query` gives for `metric` belong to: names, or numbers where there are none."""
    level, listed = metric.rpartition("/")[0] or "image", result.detail.get("queries")
    if isinstance(listed, dict):  # by block of Copydays, most of which have the originals' names
        names = listed.get(level, listed.get("original"))
        listed = [f"{level}/{name}" for name in names] if isinstance(names, list) else None
    if isinstance(listed, list) and len(listed) == count:
        return [str(name) for name in listed]
    return [f"{level} #{i}" for i in range(1, count + 1)]


def paired_difference(first: np.ndarray, second: np.ndarray, *, seed: int = 0,
                      resamples: int = RESAMPLES) -> Difference:
    """`second` minus `first`, both (Q,) of the same queries in the same order; NaN in both: skipped.

    The interval is the percentile bootstrap's over queries (Efron and Tibshirani 1993, chapter 13), the p-value that
    of random sign flips of the differences (Fisher's paired randomization test, which of 0 and 1 is McNemar's).
    DataError for other shapes and other queries skipped.
    """
    if first.shape != second.shape or (np.isnan(first) != np.isnan(second)).any():
        raise DataError(f"values of {_count(first)} and {_count(second)} queries are not of the same queries")
    gaps = (second - first)[~np.isnan(first)]
    if not len(gaps):
        raise DataError("no query has a value, so there is no difference")
    rng = np.random.default_rng(seed)
    low, high = np.quantile(_bootstrap_means(gaps, rng, resamples), (0.025, 0.975))
    return Difference(float(gaps.mean()), float(low), float(high), _sign_flips_p(gaps, rng, resamples), len(gaps))


def clearly_better(first: np.ndarray, second: np.ndarray) -> bool:
    """Is the mean of `second` higher by so much that no resampling is needed to say so?

    Of random sign flips of the gaps g, P(|sum| >= s) <= 2 exp(-s^2 / (2 sum g^2)) (Hoeffding 1963): 1e-5 here.
    """
    gaps = (second - first)[~np.isnan(first)]
    return bool(gaps.sum() > _FAR * np.sqrt((gaps**2).sum()))


def _bootstrap_means(gaps: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Means (resamples,) of as many values drawn from `gaps` with replacement."""
    values, counts = np.unique(gaps, return_counts=True)
    if len(values) <= _FEW:  # right and wrong: scipy would draw every one of 50,000 images in every resample
        return rng.multinomial(len(gaps), counts / len(gaps), size=resamples) @ values / len(gaps)
    from scipy.stats import bootstrap  # takes almost a second

    drawn = bootstrap((gaps,), np.mean, n_resamples=resamples, batch=max(1, _CELLS // len(gaps)), method="percentile",
                      random_state=rng)
    return np.asarray(drawn.bootstrap_distribution)


def _sign_flips_p(gaps: np.ndarray, rng: np.random.Generator, resamples: int) -> float:
    """Share of sign flips, the observed one counted, whose sum lies as far from 0 as that of `gaps`.

    As `scipy.stats.permutation_test` of samples, which takes 5 to 17 times as long and draws other flips; of right and
    wrong it draws how many of a size are flipped.
    """
    sizes, counts = np.unique(np.abs(gaps), return_counts=True)
    observed = abs(gaps.sum()) - _NOISE
    hits = 0
    for size in _blocks(resamples, len(gaps)):
        if len(sizes) <= _FEW:
            sums = (2 * rng.binomial(counts, 0.5, size=(size, len(counts))) - counts) @ sizes
        else:
            sums = (2.0 * rng.integers(0, 2, size=(size, len(gaps)), dtype=np.int8) - 1) @ gaps
        hits += int((np.abs(sums) >= observed).sum())
    return (hits + 1) / (resamples + 1)


def _blocks(resamples: int, width: int) -> list[int]:
    """`resamples` in parts, so that a part of rows of `width` numbers fits into memory."""
    step = max(1, _CELLS // width)
    return [min(step, resamples - start) for start in range(0, resamples, step)]


def _values(result: Result, metric: str) -> np.ndarray | None:
    correct, aps, shares = (result.detail.get(name) for name in ("correct", "aps", "shares"))
    if isinstance(correct, dict) and metric in correct:
        return unpack_bits(correct[metric], result.detail["num_test"]).astype(float)
    level, _, name = metric.rpartition("/")
    if name == "map" and isinstance(aps, dict) and level in aps:
        return np.array(aps[level], dtype=float)  # None, a query without positives, becomes NaN
    if isinstance(shares, dict) and metric in shares:
        return np.array(shares[metric], dtype=float)
    return None


def _count(values: np.ndarray) -> str:
    return f"{(~np.isnan(values)).sum()} of {len(values)}"


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean of two or more `values`.

    >>> [round(bound, 3) for bound in t_interval([1.0, 2.0, 3.0])]
    [-0.484, 4.484]
    """
    # the interval of scipy's ttest_1samp differs in the last digit, which a study's JSON shows, and loads slowly
    n = len(values)
    if n < 2:
        raise ValueError(f"an interval over seeds needs at least two values, there are {n}")
    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(stdtrit(n - 1, (1 + level) / 2)) * deviation / math.sqrt(n)
    return mean - half, mean + half


def holm(p_values: Sequence[float]) -> list[bool]:
    """Which of `p_values` are significant together (Holm 1979): the family is wrong at most once in 20.

    >>> holm([0.04, 0.001, 0.03])
    [False, True, False]
    """
    found = [False] * len(p_values)
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[index] * (len(p_values) - place) >= SIGNIFICANT:
            break
        found[index] = True
    return found


def t_test_p(gaps: Sequence[float]) -> float | None:
    """Two-sided p-value of Student's t-test that the mean of `gaps` is 0; None where they do not vary."""
    from scipy.stats import ttest_1samp  # takes almost a second

    if max(gaps) - min(gaps) < 1e-12:
        return None
    p = float(ttest_1samp(gaps, 0).pvalue)
    return p if math.isfinite(p) else None


def welch_p(first: Iterable[float], second: Iterable[float]) -> float:
    """Two-sided p-value of a difference of two means: Welch's t-test, Student's where one side is a single value.

    1 where there is nothing to estimate a spread from.
    """
    from scipy.stats import ttest_ind  # takes almost a second

    sides = [np.sort(np.array(list(values))) for values in (first, second)]
    sizes = [len(values) for values in sides]
    if max(sizes) < 2 or all(np.ptp(values) == 0 for values in sides):
        return 1.0
    p = float(ttest_ind(*sides, equal_var=min(sizes) < 2).pvalue)
    return p if math.isfinite(p) else 1.0
