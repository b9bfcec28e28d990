"""From a folder of records to table files: what `patchssl tables` does. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from patchssl.eval.records import Result
from patchssl.eval.tasks import table_metrics
from patchssl.report.tables.build import write_tables
from patchssl.report.tables.cost import write_costs
from patchssl.report.tables.paper import read_unavailable, write_paper
from patchssl.report.tables.scores import metric_place
from patchssl.report.tables.vetting import valid_costs, valid_records
from patchssl.runtime.errors import DataError, unknown_choice
from patchssl.runtime.text import command

MOST_NAMED = 3  # unreadable files in one sentence


def make_tables(results: Path, out: Path, *, paper: bool = False) -> tuple[str, list[Path], list[str]]:
    """Write the tables of the records under `results` to `out`, with `paper` also the paper's tables.

    Returns the Markdown of the tables of all datasets and costs found, the files written, and a sentence for every
    record that had to be skipped. DataError where there is nothing to make a table of.
    """
    sound, problems = valid_records(results)
    records = list(sound.values())
    costs, unsound = valid_costs(results)
    problems += unsound
    if not records and not costs:
        unread = f" that can be read: {'; '.join(problems[:MOST_NAMED])}" if problems else ""
        raise DataError(f"{results} holds no result records{unread}; make one with: "
                        + command("eval", "knn", "MODEL", "--data", "DIR", "--results", results))
    shown = (write_tables(records, out) if records else []) + (write_costs(costs, out) if costs else [])
    text = "\n".join(path.read_text("utf-8") for path in shown if path.suffix == ".md")
    paths = shown + (write_paper(records, out, costs=costs, unavailable=read_unavailable(results)) if paper else [])
    return text, paths, problems + _not_shown(records)


def _not_shown(records: Iterable[Result]) -> list[str]:
    """A sentence for every record that no table has a place for."""
    found = []
    for record in records:
        name = f"the record of {record.model} on {record.dataset} ({record.protocol})"
        if record.task not in table_metrics():
            found.append(f"{name}: {unknown_choice('task', record.task, table_metrics())}")
        elif all(metric_place(record.task, metric) is None for metric in record.metrics):
            found.append(f"{name} has none of the metrics that tables of {record.task} show: "
                         f"{', '.join(table_metrics()[record.task])}")
    return found
