"""From Copydays records to curves: how mAP falls with JPEG quality and with the share of the image cut away.

One figure's worth of curves belongs to one dataset under one protocol, both by fingerprint, as a column of the
tables does; records that differ in their weights alone share a curve, as they share a row there.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from patchssl.eval.records import Result
from patchssl.report.tables.scores import Row, Score, scores_of

TASK = "copydays"
_INTERVALS = {"seeds": "mean and 95 % t-interval over n networks",
              "queries": "95 % t-interval over the queries of single networks"}  # by kind of `Score.interval`
_BLOCK = re.compile(r"(jpegqual|crops)/([1-9][0-9]{0,2})/map")
_STRONG = "strong/map"


@dataclass(frozen=True)
class Curve:
    """mAP of one row of the tables; a fraction in [0, 1] with its interval over seeds, if there are several."""

    row: Row
    jpeg: dict[int, Score]  # by JPEG quality, ascending
    crops: dict[int, Score]  # by percent of the area cut away, ascending
    strong: Score | None  # on the strong copies

    @property
    def n(self) -> int:
        """Most networks behind one of its points."""
        return max(score.n for score in self.scores())

    def scores(self) -> list[Score]:
        """All its points."""
        return [*self.jpeg.values(), *self.crops.values(), *([self.strong] if self.strong else [])]


@dataclass(frozen=True)
class Robustness:
    """The curves on one dataset under one protocol, in the order of the tables' rows."""

    dataset: str
    protocol: str
    dataset_fingerprint: str
    protocol_fingerprint: str
    curves: tuple[Curve, ...]


def robustness_curves(results: Iterable[Result]) -> list[Robustness]:
    """The curves in all Copydays records of `results`, by dataset and protocol; empty where there are none."""
    settings: dict[tuple[str, str, str, str], dict[Row, list[Score]]] = defaultdict(lambda: defaultdict(list))
    for score in scores_of(results, TASK, lambda metric: metric == _STRONG or bool(_BLOCK.fullmatch(metric))):
        column = score.column
        key = column.dataset, column.protocol, column.dataset_fingerprint, column.protocol_fingerprint
        settings[key][score.row].append(score)
    return [Robustness(*key, tuple(_curve(row, rows[row]) for row in sorted(rows)))
            for key, rows in sorted(settings.items())]


def titles_of(settings: Sequence[Robustness], shown: Callable[[str], str] = str) -> list[str]:
    """Dataset and protocol, as `shown`; with fingerprints, as in the tables, where two would be called the same."""
    plain = [f"{shown(s.dataset)}, protocol {shown(s.protocol)}" for s in settings]
    return [f"{title} #{s.dataset_fingerprint[:6]}/{s.protocol_fingerprint[:6]}" if plain.count(title) > 1 else title
            for title, s in zip(plain, settings, strict=True)]


def intervals_in(scores: Iterable[Score]) -> str:
    """What the intervals of `scores` are, in words; empty where there are none."""
    kinds = {score.interval for score in scores}
    return "; ".join(words for kind, words in _INTERVALS.items() if kind in kinds)


def _curve(row: Row, scores: Iterable[Score]) -> Curve:
    found: dict[str, dict[int, Score]] = {"jpegqual": {}, "crops": {}}
    strong = None
    for score in scores:
        block = _BLOCK.fullmatch(score.column.metric)
        if block is None:
            strong = score
        else:
            found[block[1]][int(block[2])] = score
    jpeg, crops = (dict(sorted(found[name].items())) for name in ("jpegqual", "crops"))
    return Curve(row, jpeg, crops, strong)
