"""The numbers of retrieval and copy detection, from ranks and scores; all are fractions in [0, 1].

`average_precision` and `precision_at` take the ranks of one query's positives, as revisited Oxford and Paris do.
`score_neighbors` scores a search for copies as on Copydays: every query is a copy of one original, searched among
the others and distractors; each block of copies has its mean AP, and all queries together a pooled one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.special import ndtri

from patchssl.runtime.errors import DataError, UsageError

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


class CopyScores(NamedTuple):
    """`metrics` holds BLOCK/map for every block and overall/muap; `aps` the queries' APs, block by block."""

    metrics: dict[str, float]
    aps: dict[str, np.ndarray]


def score_neighbors(
    similarities: np.ndarray | Tensor, neighbors: np.ndarray | Tensor, originals: np.ndarray, blocks: Mapping[str, int]
) -> CopyScores:
    """Scores of what a search found: `similarities` and ids `neighbors`, both (Q, k), best first.

    The queries are those of all `blocks` (name -> how many) one after the other; `originals` (Q,) are the ids of the
    images they are copies of. An original counts among the k results only: 20 in DINO's protocol, 100 in SSCD's.
    DataError for NaN and infinity, similarities that do not fall, or blocks that do not fit.
    """
    table, found = as_table(similarities, "(queries, k)"), as_table(neighbors, "(queries, k)")
    ids = _checked(originals, len(table))
    if found.shape != table.shape or not np.isfinite(table).all() or (np.diff(table, axis=1) > 0).any():
        raise DataError("the neighbors need one finite similarity each, in falling order")
    hits = found == ids[:, None]
    return _score(table, np.where(hits.any(axis=1), hits.argmax(axis=1), table.shape[1]), blocks)


def _score(best: np.ndarray, places: np.ndarray, blocks: Mapping[str, int]) -> CopyScores:
    """From the `best` similarities (Q, k), falling, and the `places` (Q,) of the originals; k or more: not found.

    With one positive, retrieved at rank r, the trapezoid AP is (precision before + precision after) / 2: 1 at
    r = 0, 1 / (2 (r + 1)) after. facebookresearch/dino, eval_copy_detection.py; facebookresearch/sscd-copy-detection,
    datasets/copydays.py, where the pooled measure is called macro AP.
    """
    if sum(blocks.values()) != len(best) or any(count < 1 for count in blocks.values()):
        listed = ", ".join(f"{name} {count}" for name, count in blocks.items())
        raise DataError(f"{len(best)} queries cannot be split into blocks of {listed}")
    aps = np.where(places == 0, 1.0, 0.5 / (places + 1)) * (places < best.shape[1])
    ends = np.cumsum(list(blocks.values()))
    per_block = dict(zip(blocks, np.split(aps, ends[:-1]), strict=True))
    correct = np.arange(best.shape[1]) == places[:, None]
    metrics = {f"{name}/map": float(values.mean()) for name, values in per_block.items()}
    return CopyScores({**metrics, "overall/muap": micro_average_precision(best, correct, len(best))}, per_block)


def _checked(originals: np.ndarray, num_queries: int) -> np.ndarray:
    """`originals` as (Q,) int64; DataError unless they are one id for each of Q = `num_queries`."""
    ids = np.asarray(originals)
    if ids.shape != (num_queries,) or ids.dtype.kind not in "iu":
        raise DataError(f"originals are {ids.dtype} of shape {ids.shape}; {num_queries} queries need one integer each")
    if ids.min() < 0:
        raise DataError(f"originals are ids from 0 on, these begin with {ids.min()}")
    return ids.astype(np.int64)
