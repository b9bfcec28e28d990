"""Comparison tables: a pure function of result records and published numbers. Same input, same bytes.

Fractions in the records become percent here. A frame's footnotes are in `frame.attrs["notes"]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from patchssl.eval.results import Result
from patchssl.report.published import PAPER_DATASETS, Published, plain_name, published
from patchssl.report.scores import HEADLINES, NONE, Column, Row, Score, collect_scores, column_order, few_shots

METRIC_LABELS = {"top1": "top-1", "top5": "top-5", "map": "mAP", "exact": "exact matches",
                 "within1": "within one patch"}
TASK_TITLES = {"knn": "k-NN on frozen features", "linear": "Linear probe",
               "copydays": "Copydays copy detection", "roxford5k": "Revisited Oxford",
               "rparis6k": "Revisited Paris", "revisited": "Retrieval on made sets", "patches": "Patch correspondence"}
NOT_RUN, NOT_PUBLISHED, NOT_AVAILABLE = "not run", "not published", "not available"
SEED_MARK = "†"
TEST_CHOICE = "best test epoch"  # as the protocol's settings say it


def comparison_table(results: Sequence[Result], task: str = "knn") -> pd.DataFrame:
    """One row per model, one column per data set, protocol and headline metric of `task`; cells are text.

    Numbers are percent. Rows: pixels, random network, DINO, PW-Self, others, then what is published. Raises
    UsageError for an unknown task.
    """
    scores = collect_scores(results, task)
    columns = _ordered_columns(scores, task)
    headers = _headers(columns)
    cells = {(score.row, score.column): _cell(score) for score in scores}
    rows = [[row.label, row.arch, row.pretraining, *(cells.get((row, column), NOT_RUN) for column in columns)]
            for row in sorted({score.row for score in scores})]
    printed, sources = _published_rows(columns, task)
    names = ["Method", "Architecture", "Pretraining", *headers]
    frame = pd.DataFrame(rows + printed, columns=names, dtype=object)
    frame.attrs["notes"] = [*_interval_notes(scores), *_selection_notes(results, columns, task),
                            *_fingerprint_notes(results, columns, task), *sources]
    return frame


def score_table(results: Sequence[Result], task: str = "knn") -> pd.DataFrame:
    """The numbers behind `comparison_table`, one row per cell: percent, interval, n and both fingerprints."""
    records = []
    for score in collect_scores(results, task):
        bounds = [None if bound is None else round(100 * bound, 4) for bound in (score.low, score.high)]
        words = ["" if word == NONE else word for word in score.row[1:]]
        records.append([*words, task, *score.column,
                        round(100 * score.mean, 4), *bounds, score.interval, score.n, score.seeds_differ])
    names = ["method", "arch", "pretraining", "task", *Column._fields,
             "percent", "low", "high", "interval", "n", "seeds_differ"]
    return pd.DataFrame(records, columns=names)


def to_markdown(frame: pd.DataFrame) -> str:
    """A padded pipe table, numbers to the right, and the frame's notes below it."""
    header = [_escape(str(name)) for name in frame.columns]
    body = [[_escape(str(cell)) for cell in row] for row in frame.itertuples(index=False)]
    widths = [max(3, *(len(row[i]) for row in [header, *body])) for i in range(len(header))]
    named = min(3, len(header))  # method, architecture, pretraining are words
    rule = ["-" * width if i < named else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = [_line(header, widths, named), "| " + " | ".join(rule) + " |",
             *(_line(row, widths, named) for row in body)]
    notes = [f"- {_escape(note)}" for note in frame.attrs.get("notes", [])]
    return "\n".join(lines + (["", *notes] if notes else [])) + "\n"


def to_csv(frame: pd.DataFrame) -> str:
    """The frame as CSV with a header and line feeds; numbers have four decimals at most."""
    return str(frame.to_csv(index=False, lineterminator="\n", na_rep=""))


def write_tables(results: Sequence[Result], out_dir: Path, stem: str = "table") -> list[Path]:
    """Write STEM.md (a comparison table per task) and STEM.csv (the numbers behind them) to `out_dir`."""
    tasks = [task for task in HEADLINES if any(result.task == task for result in results)]
    sections = [f"## {TASK_TITLES[task]}\n\n{to_markdown(comparison_table(results, task))}" for task in tasks]
    numbers = [to_csv(score_table(results, task)) for task in tasks] or [to_csv(score_table([], "knn"))]
    header, _, _ = numbers[0].partition("\n")
    rows = "".join(text.partition("\n")[2] for text in numbers)
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = [out_dir / f"{stem}.md", out_dir / f"{stem}.csv"]
    for path, text in zip(paths, ("\n".join(sections), f"{header}\n{rows}"), strict=True):
        path.write_text(text, encoding="utf-8", newline="\n")
    return paths


def _ordered_columns(scores: Iterable[Score], task: str) -> list[Column]:
    return sorted({score.column for score in scores}, key=lambda column: column_order(column, task))


def _headers(columns: Sequence[Column]) -> list[str]:
    """Column titles; one that would stand twice gets the fingerprints it differs in."""
    plain = [f"{c.dataset}, {_metric_label(c.metric)}, % ({c.protocol})" for c in columns]
    return [f"{title} #{_mark(column)}" if plain.count(title) > 1 else title
            for title, column in zip(plain, columns, strict=True)]


def _mark(column: Column) -> str:
    return f"{column.dataset_fingerprint[:6]}/{column.protocol_fingerprint[:6]}"


def _metric_label(metric: str) -> str:
    """Words for a metric's key: top1@20 is 20-NN top-1, fewshot5/top1@20 20-NN 5-shot top-1, strong/map strong mAP."""
    name, _, neighbors = metric.partition("@")
    *level, name = name.split("/")
    if (shots := few_shots(metric)) is not None:
        level = [f"{shots}-shot"]
    words = [*level, METRIC_LABELS.get(name, name)]
    return " ".join([f"{neighbors}-NN", *words] if neighbors else words)


def _cell(score: Score) -> str:
    if score.interval == "seeds" and score.high is not None:
        mark = "" if score.seeds_differ else f" {SEED_MARK}"
        return f"{100 * score.mean:.1f} ± {100 * (score.high - score.mean):.1f} (n = {score.n}){mark}"
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
    if not all(score.seeds_differ for score in scores):
        notes.append(f"{SEED_MARK} records that share a seed or state none were averaged: "
                     "they may differ in more than the seed.")
    return notes


def _selection_notes(results: Sequence[Result], columns: Sequence[Column], task: str) -> list[str]:
    """Which protocols choose by the test images."""
    shown = {column.protocol_fingerprint for column in columns}
    names = {record.protocol for record in results if record.task == task and record.protocol_fingerprint in shown
             and record.protocol_settings.get("selection") == TEST_CHOICE}
    return [f"{name}: the {TEST_CHOICE}, as its authors report; intervals do not cover that the test images chose it."
            for name in sorted(names)]


def _fingerprint_notes(results: Sequence[Result], columns: Sequence[Column], task: str) -> list[str]:
    """Why a data set has several columns under one protocol's name."""
    notes = []
    for dataset, protocol in sorted({(c.dataset, c.protocol) for c in columns}):
        same = [c for c in columns if (c.dataset, c.protocol) == (dataset, protocol)]
        images = {c.dataset_fingerprint for c in same}
        settings = {c.protocol_fingerprint for c in same}
        if len(images) > 1:
            notes.append(f"{dataset} names {len(images)} different sets of images, a column each; "
                         "# gives the first digits of the fingerprints of images/protocol.")
        if len(settings) > 1:
            found = [r for r in results if (r.task, r.dataset, r.protocol) == (task, dataset, protocol)]
            notes.append(f"{protocol} on {dataset} was run with {len(settings)} settings, a column each that "
                         f"cannot be compared with another; they differ in {_differing(found)}.")
    return notes


def _differing(results: Sequence[Result]) -> str:
    """Names and values of the protocol settings that are not the same in all `results`."""
    names = sorted({name for result in results for name in result.protocol_settings})
    values = {name: sorted({str(result.protocol_settings.get(name, "not set")) for result in results})
              for name in names}
    parts = [f"{name} ({', '.join(found)})" for name, found in values.items() if len(found) > 1]
    return "; ".join(parts) or "settings that the records do not list"


def _published_rows(columns: Sequence[Column], task: str) -> tuple[list[list[str]], list[str]]:
    """Rows of printed numbers for the columns that have any, and the sources they cite."""
    sources: list[str] = []
    cells: dict[Row, dict[Column, str]] = {}
    for column in columns:
        for row, found in _by_row(published(task, column.dataset, column.metric)).items():
            text = _printed_cell(found, sources) if column.protocol == "dino" else "other protocol"
            cells.setdefault(row, {})[column] = text
        if plain_name(column.dataset) in PAPER_DATASETS:
            row = Row(2, "PW-Self (published)", NONE, NONE)
            cells.setdefault(row, {})[column] = NOT_AVAILABLE
    rows = [[row.label, row.arch, row.pretraining, *(cells[row].get(c, NOT_PUBLISHED) for c in columns)]
            for row in sorted(cells)]
    notes = ["Rows marked (published) are printed elsewhere, not measured here; data sets are matched by "
             "name."]
    return rows, [*notes, *(f"[{i}] {source}" for i, source in enumerate(sources, 1))] if rows else []


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


def _line(cells: Sequence[str], widths: Sequence[int], named: int) -> str:
    padded = [cell.ljust(width) if i < named else cell.rjust(width)
              for i, (cell, width) in enumerate(zip(cells, widths, strict=True))]
    return "| " + " | ".join(padded) + " |"


def _escape(text: str) -> str:
    """Text that cannot break out of a Markdown cell."""
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").split())

