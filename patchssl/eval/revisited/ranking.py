"""Revisited rankings: where the labeled images of a query stand, and what each level makes of it.

Only labeled images count in the revisited protocol, so only they are ranked: their places among a million
others come from counting, not from sorting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from torch import Tensor

from patchssl.eval.metrics import as_table, average_precision, precision_at
from patchssl.runtime.errors import DataError
from patchssl.sets.revisited import QueryTruth, Truth, as_truths

KS = (1, 5, 10)

# level -> (positives, junk); the class that is left out joins the junk
LEVELS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = MappingProxyType({
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
})

_BINS = 65536  # so that few of a million scores share a bin with a labeled image's
_BLOCK = 65536  # scores at a time: they stay in the processor's cache


class LabeledRanks(NamedTuple):
    """Zero-based ranks of one query's labeled images among the whole database, each (n,) int64, unsorted."""

    easy: np.ndarray
    hard: np.ndarray
    junk: np.ndarray


class LevelScores(NamedTuple):
    """One level, query by query: (Q,) float64, NaN for queries that have no positives there."""

    aps: np.ndarray
    precisions: dict[int, np.ndarray]  # k -> precision at k

    @property
    def num_queries(self) -> int:
        """How many queries have positives, and make the mean."""
        return int((~np.isnan(self.aps)).sum())

    def means(self) -> dict[str, float]:
        """{"map", "mp@1", ...} over queries with positives; NaN where no query has any."""
        per_query = {"map": self.aps, **{f"mp@{k}": values for k, values in self.precisions.items()}}
        used = ~np.isnan(self.aps)
        return {name: float(values[used].mean()) if used.any() else float("nan") for name, values in per_query.items()}


def levels_of_ranking(ranks: np.ndarray | Tensor, gnd: Truth) -> dict[str, LevelScores]:
    """Every level, query by query, of whole rankings `ranks` (database, queries): image ids, best first.

    DataError for a ranking that does not hold every image once, or of another number of queries.
    """
    table = as_table(ranks, "(database, queries)")
    truths = _checked(gnd, table.shape[0], table.shape[1], "ranks have the shape (database, queries)")
    if table.dtype.kind not in "iu":
        raise DataError(f"the ranks are {table.dtype}; they must be integers, the ids of images, best first")
    return score_levels([_ranks_in(table[:, query], truth) for query, truth in enumerate(truths)])


def levels_of_similarity(similarity: np.ndarray | Tensor, gnd: Truth) -> dict[str, LevelScores]:
    """Every level, query by query, of `similarity` (queries, database), larger being more similar.

    Ties as in a stable descending sort: the lower id first. Memory beyond `similarity` is a few copies of one
    row. DataError for NaN or infinity, and for a shape that is not the ground truth's.
    """
    table = as_table(similarity, "(queries, database)")
    truths = _checked(gnd, table.shape[1], table.shape[0], "similarity has the shape (queries, database)")
    found = []
    for row, truth in zip(table, truths, strict=True):
        scores = np.ascontiguousarray(row, dtype=row.dtype if row.dtype in (np.float32, np.float64) else np.float64)
        if not np.isfinite(scores).all():
            bad = np.flatnonzero(~np.isfinite(scores))
            raise DataError(f"{len(bad)} similarities of {truth.name} are NaN or infinite, first with image {bad[0]}")
        found.append(_split(ranks_of(scores, truth.labeled), truth))
    return score_levels(found)


def score_levels(ranks: Sequence[LabeledRanks], ks: Sequence[int] = KS) -> dict[str, LevelScores]:
    """AP and precision at `ks` of every query on every level, from the places of its labeled images."""
    scores = {}
    for level, (positive, junk) in LEVELS.items():
        aps, precisions = np.full(len(ranks), np.nan), {k: np.full(len(ranks), np.nan) for k in ks}
        for query, labeled in enumerate(ranks):
            found = np.sort(np.concatenate([getattr(labeled, name) for name in positive]))
            if not len(found):
                continue
            ignored = np.sort(np.concatenate([getattr(labeled, name) for name in junk]))
            clean = found - np.searchsorted(ignored, found)  # as if the junk were not in the ranking
            aps[query] = average_precision(clean, len(clean))
            for k, value in precision_at(clean, ks).items():
                precisions[k][query] = value
        scores[level] = LevelScores(aps, precisions)
    return scores


def ranks_of(scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Places (n,) of the images `ids` (n,) in a stable descending argsort of `scores` (N,), which are finite.

    Scores fall into equal bins over the range of the wanted ones. An image outranks all in lower bins, so
    whole bins are counted, and only images that share a bin with a wanted one are sorted.
    """
    if not len(ids):
        return np.empty(0, dtype=np.int64)
    wanted = scores[ids]
    low, high = wanted.min() / 2, wanted.max() / 2  # halves: their difference cannot overflow
    scale = scores.dtype.type((_BINS - 3) / max(float(high - low), 1e-30))

    def bins_of(part: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # infinite is as far outside as far gets
            return np.clip((part / 2 - low) * scale + 1, 0, _BINS - 1).astype(np.int64)

    shared, counts, near = np.zeros(_BINS, dtype=bool), np.zeros(_BINS, dtype=np.int64), []
    shared[bins_of(wanted)] = True
    for start in range(0, len(scores), _BLOCK):
        bins = bins_of(scores[start : start + _BLOCK])
        counts += np.bincount(bins, minlength=_BINS)
        near.append(start + np.flatnonzero(shared[bins]))
    candidates = np.concatenate(near)  # by ascending id
    places = np.empty(len(candidates), dtype=np.int64)
    places[np.argsort(-scores[candidates], kind="stable")] = np.arange(len(candidates))
    counts[shared] = 0
    above = counts[::-1].cumsum()[::-1]  # images in this bin and higher ones that are no candidates
    return above[bins_of(wanted)] + places[np.searchsorted(candidates, ids)]


def _checked(gnd: Truth, num_images: int, num_queries: int, shape: str) -> list[QueryTruth]:
    """The truths of `gnd`, as many as there are queries in the table whose `shape` errors state."""
    truths = as_truths(gnd, num_images)
    if len(truths) != num_queries:
        raise DataError(f"{shape}, here ({num_images} images, {num_queries} queries), but the ground truth has "
                        f"{len(truths)} queries; is it transposed?")
    if num_images < max(KS):
        raise DataError(f"precision at {max(KS)} was asked for in a database of {num_images} images")
    return truths


def _ranks_in(order: np.ndarray, truth: QueryTruth) -> LabeledRanks:
    """Places of labeled images in the ranking `order` (N,) of ids 0 to N - 1."""
    order = np.ascontiguousarray(order, dtype=np.int64)
    inside = (order >= 0) & (order < len(order))
    if not inside.all() or (np.bincount(order, minlength=len(order)) != 1).any():
        raise DataError(f"the ranking of {truth.name} does not hold each of the images 0 to {len(order) - 1} once")
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.arange(len(order))
    return _split(places[truth.labeled], truth)


def _split(ranks: np.ndarray, truth: QueryTruth) -> LabeledRanks:
    """`ranks` of `truth.labeled` by label."""
    return LabeledRanks(*np.split(ranks, np.cumsum([len(truth.easy), len(truth.hard)])))
