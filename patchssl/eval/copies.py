"""Copy detection scored as on Copydays: every query is a copy of one original, searched among distractors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from torch import Tensor

from patchssl.errors import DataError, UsageError
from patchssl.eval.metrics import as_table, micro_average_precision

_ROWS = 256  # queries at a time


class CopyScores(NamedTuple):
    """`metrics` holds BLOCK/map for every block and overall/muap; `aps` the queries' APs, block by block."""

    metrics: dict[str, float]
    aps: dict[str, np.ndarray]


def score_copies(
    similarity: np.ndarray | Tensor,
    originals: np.ndarray,
    blocks: Mapping[str, int],
    *,
    num_ranks: int = 20,
) -> CopyScores:
    """Scores of `similarity` (queries, database), larger being more similar; the database starts with the originals.

    The queries are those of all `blocks` (name -> how many) one after the other; `originals` (Q,) are the ids
    of the database images they are copies of. An original counts among the first `num_ranks` results only:
    20 in DINO's protocol, 100 in SSCD's; a smaller database is ranked whole. Ties: the lower id first.
    DataError for NaN and infinity, an original outside the database, or blocks that do not fit.
    """
    table = as_table(similarity, "(queries, database)")
    ids = _checked(originals, table, table.shape[1])
    if num_ranks < 1:
        raise UsageError(f"the first {num_ranks} results hold none; 1 is the least")
    kept = min(num_ranks, table.shape[1])
    best, places = [], []
    for start in range(0, len(table), _ROWS):
        rows, targets = table[start : start + _ROWS], ids[start : start + _ROWS, None]
        if not np.isfinite(rows).all():
            raise DataError("similarities hold NaN or infinity; when features were whitened, the whitening failed")
        own = np.take_along_axis(rows, targets, axis=1)
        lower = np.arange(rows.shape[1]) < targets
        places.append(((rows > own) | ((rows == own) & lower)).sum(axis=1))
        best.append(np.sort(np.partition(rows, -kept, axis=1)[:, -kept:], axis=1)[:, ::-1])
    return _score(np.concatenate(best), np.concatenate(places), blocks)


def score_neighbors(
    similarities: np.ndarray | Tensor, neighbors: np.ndarray | Tensor, originals: np.ndarray, blocks: Mapping[str, int]
) -> CopyScores:
    """As `score_copies`, of what a search found: `similarities` and ids `neighbors`, both (Q, k), best first."""
    table, found = as_table(similarities, "(queries, k)"), as_table(neighbors, "(queries, k)")
    ids = _checked(originals, table, None)
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


def _checked(originals: np.ndarray, table: np.ndarray, num_images: int | None) -> np.ndarray:
    """`originals` as (Q,) int64; DataError unless they are one for every row of `table`, in the database."""
    ids = np.asarray(originals)
    if ids.shape != (len(table),) or ids.dtype.kind not in "iu":
        raise DataError(f"originals are {ids.dtype} of shape {ids.shape}; {len(table)} queries need one integer each")
    if ids.min() < 0 or (num_images is not None and ids.max() >= num_images):
        raise DataError(f"originals from {ids.min()} to {ids.max()} do not lie in a database of {num_images} images")
    return ids.astype(np.int64)
