"""The numbers of retrieval and copy detection, from ranks and scores; all are fractions in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import ndtri  # type: ignore[import-untyped]

from patchssl.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

Ranks = Sequence[int] | np.ndarray


def average_precision(ranks: Ranks, num_positives: int) -> float:
    """Trapezoid area under precision-recall, as in revisited Oxford and Paris and in Copydays.

    `ranks` are the zero-based ranks of retrieved positives, ascending, junk removed; `num_positives` counts
    all positives of the query, retrieved or not. UsageError for a query without positives, which has no AP,
    and for ranks that cannot be.

    >>> round(average_precision([0, 2], num_positives=2), 4)
    0.7917
    """
    places = _as_ranks(ranks)
    if not 1 <= num_positives >= len(places):
        raise UsageError(
            f"{len(places)} of {num_positives} positives were retrieved: a query needs one positive or more, "
            "and all of them counted"
        )
    found = np.arange(len(places))
    before = np.where(places > 0, found / np.maximum(places, 1), 1.0)
    return float((before + (found + 1) / (places + 1)).sum() / 2 / num_positives)


def precision_at(ranks: Ranks, ks: Sequence[int]) -> dict[int, float]:
    """Precision among the first k, for every k of `ks`, as revisited Oxford and Paris define it.

    `ranks` as for `average_precision`. A query whose last positive stands before k is not blamed for having
    no more: it divides by min(k, place of the last positive, from 1). Nothing retrieved: 0.

    >>> precision_at([0, 2], ks=(1, 2, 10))
    {1: 1.0, 2: 0.5, 10: 0.6666666666666666}
    """
    places = _as_ranks(ranks)
    if any(k < 1 for k in ks):
        raise UsageError(f"precision at {list(ks)} was asked for; every k is 1 or more")
    if not len(places):
        return dict.fromkeys(ks, 0.0)
    depths = {k: min(k, int(places[-1]) + 1) for k in ks}
    return {k: float((places < depth).sum() / depth) for k, depth in depths.items()}


def micro_average_precision(scores: np.ndarray, correct: np.ndarray, num_positives: int) -> float:
    """One precision-recall curve over the results of all queries, sorted together; its trapezoid area.

    `scores` and `correct` (bool) have one shape, for example (queries, k); `num_positives` counts the
    positives of all queries, retrieved or not. Of equal scores the wrong results come first, so that neither
    the order of the queries nor a constant score earns anything. DataError where a score is NaN.
    """
    scores, correct = np.ravel(scores), np.ravel(correct).astype(bool)
    if scores.shape != correct.shape:
        raise UsageError(f"{len(scores)} scores and {len(correct)} judgments cannot belong together")
    if np.isnan(scores).any():
        raise DataError(f"{np.isnan(scores).sum()} of {len(scores)} scores are NaN, which has no place in a ranking")
    order = np.lexsort((correct, -scores))
    return average_precision(np.flatnonzero(correct[order]), num_positives)


def wilson_interval(num_correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (JASA 1927) for an accuracy of `num_correct` out of `total` independent images.

    >>> [round(bound, 4) for bound in wilson_interval(8, 10)]
    [0.4902, 0.9433]
    """
    if total < 1 or not 0 <= num_correct <= total:
        raise UsageError(f"{num_correct} of {total} images is no accuracy")
    # scipy's binomtest gives the same bounds, after an exact test that takes 0.5 ms
    share, z = num_correct / total, float(ndtri((1 + confidence) / 2))
    center = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, min(share, center - half)), min(1.0, max(share, center + half))  # rounding at 0 and 1


def as_table(values: np.ndarray | Tensor, shape: str) -> np.ndarray:
    """A matrix as numpy has it, half precision as float32; DataError, saying the `shape` needed, for others."""
    from torch import Tensor  # what reads records only needs no torch

    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() and values.element_size() < 4 else values
    table = np.asarray(values)
    if table.ndim != 2 or not table.size or table.dtype.kind not in "iuf":
        raise DataError(f"a table {shape} of numbers is needed, not {table.dtype} of the shape {table.shape}")
    return table.astype(np.float32) if table.dtype == np.float16 else table


def _as_ranks(ranks: Ranks) -> np.ndarray:
    """`ranks` as (R,) int64; UsageError unless they ascend from 0 or more."""
    places = np.asarray(ranks)
    if places.ndim != 1 or (places.size and places.dtype.kind not in "iu"):
        raise UsageError(f"ranks are a list of integers, not {places.dtype} of shape {places.shape}")
    places = places.astype(np.int64)
    if len(places) and (places[0] < 0 or (np.diff(places) <= 0).any()):
        raise UsageError("ranks count from 0 and ascend, each of them once")
    return places
