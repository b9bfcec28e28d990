"""From records to the tables and cards of a page: words and numbers only, nothing here knows HTML."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd

from patchssl.eval.records import Result
from patchssl.eval.tasks import table_metrics, table_titles
from patchssl.report.tables.build import comparison_table
from patchssl.report.tables.cost import CostRecord, cost_frames
from patchssl.report.tables.render import NAMED
from patchssl.report.tables.scores import METHODS, row_of

_NUMBER = re.compile(r"-?\d+(,\d{3})*(\.\d+)?")
_DIGITS = 16  # of a sha256 that tell two apart


class TableCell(NamedTuple):
    """Text, the number to sort by (None: none, sorted last), whether it is bold."""

    text: str
    number: float | None = None
    bold: bool = False


@dataclass(frozen=True)
class Table:
    """A table that can be sorted and filtered; `numeric` says which columns hold numbers.

    The rows of a `stacked` one become blocks where the page is narrow.
    """

    caption: str
    columns: tuple[str, ...]
    numeric: tuple[bool, ...]
    rows: tuple[tuple[TableCell, ...], ...]
    notes: tuple[str, ...] = ()
    stacked: bool = False


@dataclass(frozen=True)
class Card:
    """One protocol with all its settings, and what was scored under it."""

    task: str
    name: str
    version: int
    fingerprint: str
    settings: tuple[tuple[str, str], ...]
    datasets: tuple[str, ...]
    num_records: int


def comparison_tables(records: Sequence[Result]) -> list[Table]:
    """The tables of `patchssl tables`, one per task that has records."""
    there = {record.task for record in records}
    return [frame_table(comparison_table(records, task),
                        table_titles()[task]) for task in table_metrics() if task in there]


def cost_tables(costs: Sequence[CostRecord]) -> list[Table]:
    """What updates cost, where there are records of it."""
    return [frame_table(frame, title, 2) for title, frame in (cost_frames(costs) if costs else {}).items()]


def frame_table(frame: pd.DataFrame, caption: str, named: int = NAMED) -> Table:
    """A frame of text whose `named` first columns are words and whose others begin with a number, or say why not."""
    bold = set(frame.attrs.get("bold", ()))
    rows = tuple(tuple(TableCell(str(text), None if j < named else leading_number(str(text)), (i, j) in bold)
                       for j, text in enumerate(row)) for i, row in enumerate(frame.itertuples(index=False)))
    numeric = tuple(j >= named for j in range(len(frame.columns)))
    return Table(caption, tuple(map(str, frame.columns)), numeric, rows, tuple(frame.attrs.get("notes", ())), True)


def leading_number(text: str) -> float | None:
    """
    >>> leading_number("23.9 [21.8, 26.1]"), leading_number("65,536"), leading_number("not run")
    (23.9, 65536.0, None)
    """
    found = _NUMBER.match(text)
    return float(found[0].replace(",", "")) if found else None


def record_table(records: Sequence[Result]) -> Table:
    """A row for every record and headline metric, or for every metric of a record that has no headline."""
    rows = []
    for record in sorted(records, key=lambda r: (r.model, r.network.key, r.task, r.dataset, r.protocol)):
        headlines = [name for name in table_metrics().get(record.task, ()) if name in record.metrics]
        for metric in headlines or sorted(record.metrics)[:1]:
            value = 100 * record.metrics[metric]
            rows.append((TableCell(record.model), TableCell(f"{value:.1f}", value), TableCell(metric),
                         TableCell(record.task),
                         TableCell(record.dataset), TableCell(record.protocol), TableCell(METHODS.get(record.method,
                                                                                                      record.method)),
                         _seed(record), TableCell(f"{record.duration:,.1f}", record.duration),
                         TableCell(record.network.key[:8])))
    columns = ("Model", "%", "Metric", "Task", "Data set", "Protocol", "Method", "Seed", "Seconds", "Weights")
    return Table("All records", columns, tuple(name in ("%", "Seed", "Seconds") for name in columns), tuple(rows))


def network_table(records: Sequence[Result]) -> Table:
    """The networks that were scored, by their weights."""
    by_network = {(record.network.weights, record.network.key, record.model): record for record in records}
    rows = tuple((TableCell(record.model), TableCell(METHODS.get(record.method, record.method)), TableCell(record.arch),
                  TableCell(row_of(record).pretraining), _seed(record), TableCell(record.weights_sha256[:_DIGITS]))
                 for _, record in sorted(by_network.items(), key=lambda item: (item[1].model, item[0])))
    columns = ("Model", "Method", "Architecture", "Pretraining", "Seed", "sha256 of the weights")
    return Table("Networks", columns, tuple(name == "Seed" for name in columns), rows, stacked=True)


def dataset_table(records: Sequence[Result]) -> Table:
    """The datasets by what is in them."""
    counts = Counter((record.dataset, record.task, record.dataset_fingerprint) for record in records)
    rows = tuple((TableCell(name), TableCell(task), TableCell(fingerprint[:_DIGITS]), TableCell(f"{count:,}", count))
                 for (name, task, fingerprint), count in sorted(counts.items()))
    return Table("Data sets", ("Data set", "Task", "Fingerprint of the images", "Records"),
                 (False, False, False, True), rows)


def environment_table(records: Sequence[Result]) -> Table:
    """On what machines and with which versions the numbers were made."""
    names = sorted({name for record in records for name in record.versions})
    counts = Counter((record.device, *(record.versions.get(name) or "none" for name in names)) for record in records)
    rows = tuple((*map(TableCell, words), TableCell(f"{count:,}", count)) for words, count in sorted(counts.items()))
    return Table("Versions and devices", ("Device", *names, "Records"),
                 (False, *(False for _ in names), True), rows)


def protocol_cards(records: Iterable[Result]) -> list[Card]:
    """A card per protocol, by fingerprint."""
    groups: dict[tuple[str, str, int, str], list[Result]] = defaultdict(list)
    for record in records:
        groups[record.task, record.protocol, record.protocol_version, record.protocol_fingerprint].append(record)
    cards = []
    for (task, name, version, fingerprint), group in sorted(groups.items()):
        settings = tuple((key.replace("_", " "), _setting(value))
                         for key, value in sorted(group[0].protocol_settings.items()))
        cards.append(Card(task, name, version, fingerprint[:_DIGITS], settings,
                          tuple(sorted({record.dataset for record in group})), len(group)))
    return cards


def _setting(value: object) -> str:
    """
    >>> _setting([1, 5]), _setting(None), _setting(0.07)
    ('1, 5', 'none', '0.07')
    """
    if isinstance(value, list | tuple):
        return ", ".join(map(_setting, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)


def _seed(record: Result) -> TableCell:
    return TableCell("–" if record.seed is None else str(record.seed), record.seed)
