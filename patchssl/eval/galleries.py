"""What a record keeps so that its worst and best queries can be looked at: who was found, in which role.

Names and sizes of files, no pixels: a reader who has the images can show them, and sees by the size whether they
are the ones that were scored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from patchssl.data.images import FileImages
from patchssl.eval.records import plain_text
from patchssl.eval.revisited.ranking import ranks_of

POSITIVE, JUNK, ERROR, DISTRACTOR = "positive", "junk", "error", "distractor"
ROLES = (POSITIVE, JUNK, ERROR, DISTRACTOR)
WORST, BEST = "worst", "best"
NUM_SHOWN = 10  # first results of a query
_ENDS = 8  # queries of either end
_MOST_LATE = 4
_DIGITS = 6  # of an AP in a record


class Picture(NamedTuple):
    """Image `number` of `images`."""

    images: FileImages
    number: int

    def as_dict(self) -> dict[str, Any]:
        """Name relative to the images' folder, and the file's bytes, None for one that is gone."""
        try:
            size: int | None = self.images.path(self.number).stat().st_size
        except OSError:
            size = None
        return {"name": plain_text(self.images.item_name(self.number)), "bytes": size}


class Shown(NamedTuple):
    """A query: its first results with their roles, and the positives behind those with their ranks, from 1."""

    query: Picture
    results: Sequence[tuple[Picture, str]]
    late: Sequence[tuple[Picture, int]]
    num_positives: int

    def as_dict(self, ap: float, end: str) -> dict[str, Any]:
        return {"query": self.query.as_dict(), "ap": round(ap, _DIGITS), "end": end,
                "num_positives": self.num_positives,
                "results": [{**picture.as_dict(), "role": role} for picture, role in self.results],
                "late": [{**picture.as_dict(), "rank": rank} for picture, rank in self.late]}


def ends_of(aps: np.ndarray) -> list[tuple[int, str]]:
    """Up to eight queries of lowest AP, worst first, then up to eight others of highest, best first; NaN: no query.

    >>> ends_of(np.array([0.5, np.nan, 0.2]))
    [(2, 'worst'), (0, 'best')]
    """
    order = np.argsort(aps, kind="stable")[: int((~np.isnan(aps)).sum())]
    worst = order[: min(_ENDS, (len(order) + 1) // 2)]
    best = order[len(worst) :][-_ENDS:][::-1]
    return [*((int(query), WORST) for query in worst), *((int(query), BEST) for query in best)]


def first_results(scores: np.ndarray, num: int = NUM_SHOWN) -> np.ndarray:
    """The first `num` ids of a stable descending argsort of finite `scores` (N,), without sorting all.

    >>> first_results(np.array([0.1, 0.9, 0.5, 0.9]), 3).tolist()
    [1, 3, 2]
    """
    num = min(num, len(scores))
    candidates = np.flatnonzero(scores >= np.partition(scores, -num)[-num])  # by ascending id
    return candidates[np.argsort(-scores[candidates], kind="stable")[:num]]


def latest(scores: np.ndarray, positives: np.ndarray) -> list[tuple[int, int]]:
    """Of the ids `positives` the last few that the first results lack, and their ranks from 1, by rank."""
    places = ranks_of(scores, positives)
    found = sorted((int(place) + 1, int(image)) for place, image in zip(places, positives, strict=True)
                   if place >= NUM_SHOWN)
    return [(image, rank) for rank, image in found[-_MOST_LATE:]]


def gallery(aps: np.ndarray, shown: Iterable[Shown]) -> list[dict[str, Any]]:
    """Plain JSON values of the queries that `ends_of` chose, `shown` in its order."""
    return [found.as_dict(float(aps[query]), end) for (query, end), found in zip(ends_of(aps), shown, strict=True)]
