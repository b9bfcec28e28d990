"""Comparison tables: a pure function of result records and published numbers. Same input, same bytes.

Fractions in the records become percent here. A frame's footnotes are in `frame.attrs["notes"]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from patchssl.eval.records import Result
from patchssl.eval.tasks import table_metrics, table_titles
from patchssl.report.tables.best import BOLD_NOTE, best_cells
from patchssl.report.tables.published import PAPER_DATASETS, Published, only_named_so, plain_name, published
from patchssl.report.tables.render import NAMED, shortened, write_frames
from patchssl.report.tables.scores import (
    METHODS,
    NONE,
    Column,
    Row,
    Score,
    collect_scores,
    column_order,
    few_shots,
)

METRIC_LABELS = {"top1": "top-1", "top5": "top-5", "map": "mAP", "exact": "exact matches",
                 "within1": "within one patch"}
NOT_RUN, NOT_PUBLISHED, NOT_AVAILABLE, OTHER_PROTOCOL = "not run", "not published", "not available", "other protocol"
OTHER_IMAGES = "other images"
PRETRAINING_MARK = "‡"
TEST_CHOICE = "best test epoch"  # as the protocol's settings say it
UNTRAINED = {NONE, "untrained"}  # what stands for the pretraining of pixels and random networks
MOST_LISTED = 4  # kinds of pretraining that a note names
REFERENCE_NOTE = ("Chance: a patch drawn at random. Position only: the patch at the same place of the grid. Both, and "
                  "Raw pixels where it was not run by itself, are of the same pairs of views as the networks.")
LONGEST_VALUE = 80  # letters of a setting that a note shows


def comparison_table(results: Sequence[Result], task: str = "knn") -> pd.DataFrame:
    """One row per model, one column per dataset, protocol and headline metric of `task`; cells are text.

    Numbers are percent. Rows: pixels, random network, DINO, PW-Self, others, then what is published. Raises
    UsageError for an unknown task.
    """
    return _task_tables(results, task)[0]


def score_table(results: Sequence[Result], task: str = "knn") -> pd.DataFrame:
    """The numbers behind `comparison_table`, one row per cell: percent, interval, n, source and both fingerprints."""
    return _task_tables(results, task)[1]


def _task_tables(results: Sequence[Result], task: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    scores = collect_scores(results, task)
    columns = sorted({score.column for score in scores}, key=column_order)
    return make_frames(scores, columns, sorted({score.row for score in scores}), results)


def make_frames(scores: Sequence[Score], columns: Sequence[Column], rows: Sequence[Row], results: Sequence[Result],
                empty: Mapping[Column, str] | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table of `rows` by `columns` filled from `scores` with what is published below, and its numbers.

    `empty` says what a cell of a column reads that was not measured, where that is not NOT_RUN.
    """
    best = best_cells(scores)
    return _table(scores, columns, rows, results, best, empty or {}), _numbers(scores, columns, best)


def _table(scores: Sequence[Score], columns: Sequence[Column], rows: Sequence[Row], results: Sequence[Result],
           best: set[tuple[Row, Column]], empty: Mapping[Column, str]) -> pd.DataFrame:
    """Text in the cells."""
    measured = {(score.row, score.column): score for score in scores}
    others = _named_so(scores)
    printed, sources = published_cells([column for column in columns if column not in others])
    mixed = _mixed_pretraining(columns, [*measured, *((row, column) for row, found in printed.items()
                                                       for column, text in found.items() if text[0].isdigit())])
    body = [_cells(row, columns, lambda place: _cell(measured[place]) if place in measured
                   else empty.get(place[1], NOT_RUN)) for row in rows]
    body += [_cells(row, columns, lambda place: OTHER_IMAGES if place[1] in others else
                    printed[place[0]].get(place[1], NOT_PUBLISHED)) for row in printed]
    headers = [f"{title} {PRETRAINING_MARK}" if column in mixed else title
               for title, column in zip(_headers(columns), columns, strict=True)]
    frame = pd.DataFrame(body, columns=["Method", "Architecture", "Pretraining", *headers], dtype=object)
    frame.attrs["bold"] = [(i, j) for i, row in enumerate(rows) for j, column in enumerate(columns, NAMED)
                           if (row, column) in best]
    frame.attrs["notes"] = [*_interval_notes(scores), *_bold_notes(scores), *_pretraining_notes(mixed),
                            *_selection_notes(results, columns), *_fingerprint_notes(results, columns),
                            *_other_images_notes(others), *sources]
    return frame


def _numbers(scores: Sequence[Score], columns: Sequence[Column], best: set[tuple[Row, Column]]) -> pd.DataFrame:
    """`scores` and what is published for `columns`, one row per number."""
    records = []
    for score in scores:
        bounds = [None if bound is None else round(100 * bound, 4) for bound in (score.low, score.high)]
        words = ["" if word == NONE else word for word in score.row[1:]]
        records.append([*words, *score.column, round(100 * score.mean, 4), *bounds, score.interval, score.n,
                        True, (score.row, score.column) in best, "measured"])
    others = _named_so(scores)
    for column in columns:
        for number in _comparable(column) if column not in others else ():
            records.append([f"{number.method} (published)", number.arch, number.pretraining, *column,
                            round(100 * number.value, 4), None, None, "", "", "", False, number.source])
    names = ["method", "arch", "pretraining", *Column._fields,
             "percent", "low", "high", "interval", "n", "seeds_differ", "best", "source"]
    return pd.DataFrame(records, columns=names)


def write_tables(results: Sequence[Result], out_dir: Path, stem: str = "table") -> list[Path]:
    """Write STEM.md and STEM.tex (a table per task) and STEM.csv (the numbers behind them) to `out_dir`."""
    tasks = [task for task in table_metrics() if any(result.task == task for result in results)]
    made = {table_titles()[task]: _task_tables(results, task) for task in tasks}
    numbers = [table for _, table in made.values()] or [score_table([])]
    return write_frames({title: frame for title, (frame, _) in made.items()}, numbers, out_dir, stem)


def published_cells(columns: Sequence[Column]) -> tuple[dict[Row, dict[Column, str]], list[str]]:
    """Rows of printed numbers for the `columns` that have any, and notes with the sources they cite."""
    sources: list[str] = []
    cells: dict[Row, dict[Column, str]] = {}
    for column in columns:
        for row, found in _by_row(published(column.task, column.dataset, column.metric)).items():
            same = [number for number in found if number.protocol_name == column.protocol]
            cells.setdefault(row, {})[column] = _printed_cell(same, sources) if same else OTHER_PROTOCOL
        if plain_name(column.dataset) in PAPER_DATASETS:
            row = Row(2, "PW-Self (published)", NONE, NONE)
            cells.setdefault(row, {})[column] = NOT_AVAILABLE
    notes = ["Rows marked (published) are printed elsewhere, not measured here; data sets are matched by name, and a "
             f"number stands only under the protocol it was printed for ({OTHER_PROTOCOL}: under another).",
             f"PW-Self (published), {NOT_AVAILABLE}: its authors' numbers could not be had."]
    if any(column.task == "linear" and text[0].isdigit() for found in cells.values() for column, text in found.items()):
        notes.append("Published linear accuracies are the best of a sweep over learning rates, for every model.")
    return dict(sorted(cells.items())), [*notes, *(f"[{i}] {source}" for i, source in enumerate(sources, 1))
                                         ] if cells else []


def _named_so(scores: Sequence[Score]) -> set[Column]:
    """The columns whose images only have the name of a published set, by their number."""
    return {score.column for score in scores if any(map(only_named_so, score.records))}


def _other_images_notes(others: set[Column]) -> list[str]:
    return [f"{name}: these are not as many images as the set of that name has, or the records do not say how many; "
            "nothing that is published for it stands beside them." for name in sorted({c.dataset for c in others})]


def _comparable(column: Column) -> list[Published]:
    """What is published for `column` under its own protocol."""
    return [number for number in published(column.task, column.dataset, column.metric)
            if number.protocol_name == column.protocol]


def _cells(row: Row, columns: Sequence[Column], text: Callable[[tuple[Row, Column]], str]) -> list[str]:
    return [row.label, row.arch, row.pretraining, *(text((row, column)) for column in columns)]


def _mixed_pretraining(columns: Sequence[Column], places: Iterable[tuple[Row, Column]]) -> dict[Column, list[str]]:
    """The columns whose numbers come from different pretraining, with all that is in them."""
    kinds: dict[Column, set[str]] = {column: set() for column in columns}
    for row, column in places:
        if column in kinds:
            kinds[column] |= {row.pretraining} - UNTRAINED
    return {column: sorted(found) for column, found in kinds.items() if len(found) > 1}


def _pretraining_notes(mixed: dict[Column, list[str]]) -> list[str]:
    if not mixed:
        return []
    kinds = sorted({kind for found in mixed.values() for kind in found})
    listed = f" ({'; '.join(kinds)})" if len(kinds) <= MOST_LISTED else ""
    return [f"{PRETRAINING_MARK} rows of this column differ in pretraining data or epochs, as the column Pretraining "
            f"says{listed}: their differences are not those of the methods alone."]


def _bold_notes(scores: Sequence[Score]) -> list[str]:
    columns = [score.column for score in scores]
    return [BOLD_NOTE] if len(set(columns)) < len(columns) else []


def _headers(columns: Sequence[Column]) -> list[str]:
    """Column titles; one that would stand twice gets the fingerprints it differs in."""
    plain = [f"{c.dataset}, {_metric_label(c)}, % ({c.protocol})" for c in columns]
    return [f"{title} #{_mark(column)}" if plain.count(title) > 1 else title
            for title, column in zip(plain, columns, strict=True)]


def _mark(column: Column) -> str:
    return f"{column.dataset_fingerprint[:6]}/{column.protocol_fingerprint[:6]}"


def _metric_label(column: Column) -> str:
    """Words for a metric's key: top1@20 is 20-NN top-1, fewshot5/top1@20 20-NN 5-shot top-1, strong/map strong mAP."""
    name, _, neighbors = column.metric.partition("@")
    *level, name = name.split("/")
    if (shots := few_shots(column.metric)) is not None:
        level = [f"{shots}-shot"]
    words = [*level, METRIC_LABELS.get(name, name)]
    kind = [f"{neighbors}-NN"] if neighbors else ["linear"] if column.task == "linear" else []
    return " ".join([*kind, *words])


def _cell(score: Score) -> str:
    if score.interval == "seeds" and score.high is not None:
        return f"{100 * score.mean:.1f} ± {100 * (score.high - score.mean):.1f} (n = {score.n})"
    if score.interval == "draws" and score.high is not None:
        return f"{100 * score.mean:.1f} ± {100 * (score.high - score.mean):.1f} ({score.draws} draws)"
    if score.low is not None and score.high is not None:
        return f"{100 * score.mean:.1f} [{100 * score.low:.1f}, {100 * score.high:.1f}]"
    return f"{100 * score.mean:.1f}"


def _interval_notes(scores: Sequence[Score]) -> list[str]:
    notes = []
    if any(score.interval == "seeds" for score in scores):
        notes.append("± is half of the 95 % t-interval of the mean over n training seeds.")
    if any(score.interval == "draws" for score in scores):
        notes.append("± (draws) is the standard deviation over draws of the training images, of a single network: it "
                     "knows nothing of other seeds.")
    if any(score.interval == "images" for score in scores):
        notes.append("[low, high] is the 95 % Wilson interval over the test images of a single network: "
                     "it knows nothing of other seeds.")
    if any(score.interval == "queries" for score in scores):
        notes.append("[low, high] of a mean of average precisions or of shares is the 95 % t-interval over the queries "
                     "or images of a single network.")
    if any(score.row.label == METHODS["position"] for score in scores):
        notes.append(REFERENCE_NOTE)
    if any(score.alone for score in scores):
        notes.append("Networks of one method, architecture and pretraining that state no seed, or the same one, are "
                     "not averaged, each has a row by its name: they may differ in more than the seed.")
    return notes


def _selection_notes(results: Sequence[Result], columns: Sequence[Column]) -> list[str]:
    """Which protocols choose by the test images."""
    shown = {(column.task, column.protocol_fingerprint) for column in columns}
    names = {record.protocol for record in results if (record.task, record.protocol_fingerprint) in shown
             and record.protocol_settings.get("selection") == TEST_CHOICE}
    return [f"{name}: the {TEST_CHOICE}, as its authors report; intervals do not cover that the test images chose it."
            for name in sorted(names)]


def _fingerprint_notes(results: Sequence[Result], columns: Sequence[Column]) -> list[str]:
    """Why a dataset has several columns under one protocol's name."""
    notes = []
    for cell in sorted({(c.task, c.dataset, c.protocol) for c in columns}):
        same = [c for c in columns if (c.task, c.dataset, c.protocol) == cell]
        _, dataset, protocol = cell
        images = {c.dataset_fingerprint for c in same}
        settings = {c.protocol_fingerprint for c in same}
        found = [r for r in results if (r.task, r.dataset, r.protocol) == cell]
        older = {r.dataset_fingerprint for r in found if "fingerprints_cover" not in r.detail} & images
        if len(images) > 1:
            notes.append(f"{dataset} names {len(images)} different sets of images, a column each; "
                         "# gives the first digits of the fingerprints of images/protocol.")
        if older and older != images:
            notes.append(f"of these, {', '.join(f'#{digits[:6]}' for digits in sorted(older))} is known by an earlier "
                         "version, by names and sizes alone, and may be the same images as another: score its models "
                         "again to compare them.")
        if len(settings) > 1:
            notes.append(f"{protocol} on {dataset} was run with {len(settings)} settings, a column each that "
                         f"cannot be compared with another; they differ in {differing_settings(found)}.")
    return notes


def differing_settings(results: Sequence[Result]) -> str:
    """Names and values of the protocol settings that are not the same in all `results`."""
    names = sorted({name for result in results for name in result.protocol_settings})
    values = {name: sorted({shortened(str(result.protocol_settings.get(name, "not set")), LONGEST_VALUE)
                            for result in results}) for name in names}
    parts = [f"{name} ({', '.join(found)})" for name, found in values.items() if len(found) > 1]
    return "; ".join(parts) or "settings that the records do not list"


def _by_row(found: Sequence[Published]) -> dict[Row, list[Published]]:
    order = {"DINO": 0, "iBOT": 1}
    rows: dict[Row, list[Published]] = {}
    for number in found:
        row = Row(order.get(number.method, 3), f"{number.method} (published)", number.arch,
                  number.pretraining)
        rows.setdefault(row, []).append(number)
    return rows


def _printed_cell(found: Sequence[Published], sources: list[str]) -> str:
    """Each different value once, with the number of the first source that prints it."""
    first = {number.value: number.source for number in reversed(found)}
    for number in found:
        if first[number.value] not in sources:
            sources.append(first[number.value])
    values = dict.fromkeys(number.value for number in found)
    return ", ".join(f"{100 * value:.1f} [{sources.index(first[value]) + 1}]" for value in values)
