"""Retrieval on revisited Oxford and Paris (Radenovic et al., CVPR 2018): easy, medium and hard."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from patchssl.eval.revisited.ranking import levels_of_ranking, levels_of_similarity
from patchssl.sets.revisited import Truth


def score_ranking(ranks: np.ndarray | Tensor, gnd: Truth) -> dict[str, dict[str, float]]:
    """{"easy" | "medium" | "hard": {"map", "mp@1", "mp@5", "mp@10"}} of whole rankings.

    `ranks` (database, queries), as in the official code: a column holds every image id once, best first. `gnd`
    is what `read_ground_truth` returns, or the `gnd` of the file. Queries without positives on a level are
    skipped in its means, which are NaN when none is left; `ranking.levels_of_ranking` gives single queries.
    DataError names what does not fit.
    """
    return {level: scores.means() for level, scores in levels_of_ranking(ranks, gnd).items()}


def score_similarity(similarity: np.ndarray | Tensor, gnd: Truth) -> dict[str, dict[str, float]]:
    """As `score_ranking`, of `similarity` (queries, database) and without sorting it.

    Equal to a stable descending argsort of every row: of equal similarities the lower id comes first. Distractors
    are columns after the database's. DataError for NaN and infinity; `ranking.levels_of_similarity` gives
    single queries.
    """
    return {level: scores.means() for level, scores in levels_of_similarity(similarity, gnd).items()}
