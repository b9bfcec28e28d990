"""One self-contained HTML page from records, logs and figures; nothing else names jinja2.

The page loads nothing: styles, script and pictures are inside, a content security policy with their hashes refuses
all else. Every value is escaped by the templates. There is no date in it: the same input gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from patchssl.eval.galleries import POSITIVE
from patchssl.eval.records import Result
from patchssl.report.page import charts
from patchssl.report.page.galleries import Gallery, Named, Query
from patchssl.report.page.pictures import Pictures
from patchssl.report.page.sections import (
    comparison_tables,
    cost_tables,
    dataset_table,
    environment_table,
    network_table,
    protocol_cards,
    record_table,
)
from patchssl.report.page.training import TrainingSection
from patchssl.report.tables.cost import CostRecord
from patchssl.report.tables.robustness import Robustness, intervals_in, titles_of
from patchssl.report.tables.scores import NONE, Score

_ASSETS = files("patchssl.report.page") / "assets"


class Figure(NamedTuple):
    """A picture that was drawn elsewhere: `url` is a data: address, `alt` says what is to be seen."""

    title: str
    caption: str
    url: str
    alt: str


@dataclass(frozen=True)
class Content:
    """What a page shows."""

    records: Sequence[Result]
    costs: Sequence[CostRecord]
    problems: Sequence[str]
    robustness: Sequence[Robustness]
    runs: Sequence[TrainingSection]
    compared: Sequence[charts.Chart]
    galleries: Sequence[Gallery]
    num_more: int  # galleries that are not shown
    pictures: Pictures
    figures: Sequence[Figure]


class Shot(NamedTuple):
    """An image of a gallery: `role` chooses the frame, `words` say it, `picture` is its number, if it has one."""

    role: str
    words: str
    name: str
    picture: int | None


@dataclass(frozen=True)
class ShownQuery:
    """A query as a template needs it; `more` counts all its positives where not all late ones are shown."""

    name: str
    ap: str
    shot: Shot
    results: list[Shot]
    late: list[Shot]
    more: int


def render_page(content: Content) -> str:
    """The whole page."""
    records = content.records
    tables = [*comparison_tables(records), *cost_tables(content.costs), *([record_table(records)] if records else [])]
    galleries = _galleries(content)
    style, script = ((_ASSETS / f"page.{kind}").read_text("utf-8").replace("\r\n", "\n") for kind in ("css", "js"))
    parts = {
        "results": ("Results", bool(tables)), "robustness": ("Robustness", bool(content.robustness)),
        "training": ("Training", bool(content.runs)), "galleries": ("Queries", bool(galleries)),
        "figures": ("Attention and matches", bool(content.figures)), "protocols": ("Protocols", bool(content.records)),
        "provenance": ("Provenance", bool(content.records)),
    }
    environment = Environment(loader=PackageLoader("patchssl.report.page", "assets"), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals["slug"] = _distinct(slug)
    environment.globals["size"] = {"width": charts.WIDTH, "height": charts.HEIGHT, "left": charts.LEFT,
                                   "right": charts.RIGHT, "top": charts.TOP, "bottom": charts.BOTTOM}
    provenance = [network_table(records), dataset_table(records), environment_table(records)] if records else []
    return environment.get_template("page.html").render(
        style=style, script=script, style_hash=_hash(style), script_hash=_hash(script),
        sections=[(name, title) for name, (title, there) in parts.items() if there], lead=_lead(content),
        problems=content.problems, tables=tables, robustness=_robustness(content.robustness),
        runs=content.runs, compared=content.compared, galleries=galleries, figures=content.figures,
        picture_notes=_picture_notes(content), cards=protocol_cards(records), provenance=provenance,
        pictures=content.pictures.urls,
    )


def slug(text: str) -> str:
    """A name for a place in the page.

    >>> slug("k-NN on frozen features")
    'k-nn-on-frozen-features'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "part"


def _distinct(name: Callable[[str], str]) -> Callable[[str], str]:
    """`name`, numbered where it gives the same twice: no two places of a page have one name."""
    counts: Counter[str] = Counter()

    def numbered(text: str) -> str:
        counts[name(text)] += 1
        return name(text) if counts[name(text)] == 1 else f"{name(text)}-{counts[name(text)]}"

    return numbered


def _hash(text: str) -> str:
    """As a content security policy names an inline element."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _lead(content: Content) -> str:
    networks = len({record.network.key for record in content.records})
    datasets = len({record.dataset_fingerprint for record in content.records})
    counts = {"record": len(content.records), "network": networks, "data set": datasets, "run": len(content.runs)}
    there = ", ".join(_count(number, word) for word, number in counts.items() if number)
    return f"{there}." + (f" {_count(len(content.problems), 'thing')} left out." if content.problems else "")


def _count(number: int, word: str) -> str:
    """
    >>> _count(1, "run"), _count(1200, "record")
    ('1 run', '1,200 records')
    """
    return f"{number:,} {word}{'s' * (number != 1)}"


def _robustness(parts: Sequence[Robustness]) -> list[dict[str, object]]:
    """A title and two charts for every dataset and protocol; what differs in its settings alone says so."""
    return [{"title": title, "charts": [chart for chart in _robustness_charts(part) if chart],
             "bands": intervals_in(score for curve in part.curves
                                   for score in (*curve.jpeg.values(), *curve.crops.values()))}
            for title, part in zip(titles_of(parts), parts, strict=True)]


def _robustness_charts(part: Robustness) -> list[charts.Chart | None]:
    qualities = sorted({quality for curve in part.curves for quality in curve.jpeg})
    jpeg, crops = {}, {}
    for curve in part.curves:
        label = ", ".join(word for word in (curve.row.label, curve.row.arch) if word != NONE)
        jpeg[label] = {float(qualities.index(quality)): score for quality, score in curve.jpeg.items()}
        crops[label] = {float(percent): score for percent, score in curve.crops.items()}

    def chart(title: str, x_label: str, scores: Mapping[str, Mapping[float, Score]],
              x_names: Sequence[str] | None = None) -> charts.Chart | None:
        lines = {label: [(x, 100 * score.mean) for x, score in found.items()] for label, found in scores.items()}
        bands = {label: [(x, 100 * max(0.0, score.low), 100 * min(1.0, score.high)) for x, score in found.items()
                         if score.low is not None and score.high is not None] for label, found in scores.items()}
        return charts.line_chart(title, x_label, "mAP, %", lines, bands=bands, x_names=x_names, floor=0.0)

    return [chart("JPEG quality of the copies", "JPEG quality", jpeg, [str(quality) for quality in qualities]),
            chart("Share of the area cut away", "percent cut away", crops)]


def _galleries(content: Content) -> list[dict[str, object]]:
    """By record, in the order of their names."""
    by_record: dict[int, list[Gallery]] = {}
    for gallery in content.galleries:
        by_record.setdefault(id(gallery.record), []).append(gallery)
    groups = sorted(by_record.values(), key=lambda group: _title(group[0].record))
    return [{"title": _title(group[0].record), "levels": [
        {"name": gallery.level, "score": f"{gallery.record.metrics[f'{gallery.level}/map']:.1%}",
         "worst": _queries(gallery.worst, gallery.record, content.pictures),
         "best": _queries(gallery.best, gallery.record, content.pictures)} for gallery in group]} for group in groups]


def _title(record: Result) -> str:
    return f"{record.model} ({record.network.key[:8]}): {record.dataset}, protocol {record.protocol}"


def _queries(queries: Iterable[Query], record: Result, pictures: Pictures) -> list[ShownQuery]:
    def shot(role: str, words: str, image: Named) -> Shot:
        return Shot(role, words, image.name, pictures.number(image.name, image.bytes, record.dataset))

    return [ShownQuery(
        query.query.name, f"{query.ap:.1%}", shot("asked", "query", query.query),
        [shot(found.role, f"{rank} {found.role}", found) for rank, found in enumerate(query.results, 1)],
        [shot(POSITIVE, f"{late.rank:,} {POSITIVE}", late) for late in query.late],
        query.num_positives if _hidden(query) else 0) for query in queries]


def _hidden(query: Query) -> bool:
    """Did more positives come later than those that the record names?"""
    seen = sum(found.role == POSITIVE for found in query.results)
    return query.num_positives > seen + len(query.late)


def _picture_notes(content: Content) -> list[str]:
    """What is to be done about pictures that are missing."""
    pictures, notes = content.pictures, []
    if content.num_more:
        notes.append(f"The queries of {_count(content.num_more, 'further level')} are not shown; name a smaller folder "
                     "as --results for them.")
    if pictures.num_absent and not pictures.folders:
        notes.append("There are names only: give the folders of the data sets as --data to see the images.")
    elif pictures.num_absent:
        notes.append(f"{_count(pictures.num_absent, 'image')} of this name and size could not be found below the "
                     "folders given as --data.")
    if pictures.num_over:
        notes.append(f"{_count(pictures.num_over, 'image')} would have made the page too large and are left out.")
    return notes
