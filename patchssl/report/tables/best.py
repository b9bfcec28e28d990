"""Which number of a column may be printed bold: the best measured one, where chance is ruled out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from patchssl.report.tables.scores import REFERENCES, Column, Row, Score
from patchssl.report.tables.stats import SIGNIFICANT, clearly_better, paired_difference, per_query, welch_p

BOLD_NOTE = ("Bold: better than every other measured number of its column, each at the 5 % level: paired over test "
             "images or queries between single networks (bootstrap interval and sign flips), a t-test over seeds where "
             "there are several. Nothing is bold where this does not hold or the records lack detail for it.")


def best_cells(scores: Iterable[Score]) -> set[tuple[Row, Column]]:
    """Of every column of two or more scores, the best cell if it is significantly better than each other one.

    To be better than all is claimed only if each comparison alone is significant, so that more rows do not make the
    claim easier (an intersection-union test) and nothing is corrected for their number.
    """
    columns: dict[Column, list[Score]] = defaultdict(list)
    for score in scores:
        columns[score.column].append(score)
    found = set()
    for column, cells in columns.items():
        leader, *others = sorted(cells, key=lambda score: (-score.mean, score.row))
        if others and _beats_all(leader, others):
            found.add((leader.row, column))
    return found


def _beats_all(leader: Score, others: list[Score]) -> bool:
    """The nearest rows first: one that is not beaten ends it."""
    metric = leader.column.metric
    values = per_query(leader.records[0], metric) if leader.n == 1 else None
    return all(_beats(leader, values, other, metric) for other in others)


def _beats(leader: Score, values: np.ndarray | None, other: Score, metric: str) -> bool:
    if leader.mean <= other.mean:
        return False
    if leader.n > 1 or other.n > 1:
        sides = ([record.metrics[metric] for record in score.records] for score in (leader, other))
        return welch_p(*sides) < SIGNIFICANT
    against = per_query(other.records[0], metric)
    if against is None and values is not None and other.records[0].method in REFERENCES:
        against = np.where(np.isnan(values), np.nan, other.mean)
    if values is None or against is None or values.shape != against.shape:
        return False
    if (np.isnan(values) != np.isnan(against)).any():
        return False
    return clearly_better(against, values) or paired_difference(against, values).significant
