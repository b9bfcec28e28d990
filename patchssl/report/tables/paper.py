"""The tables of the PW-Self paper (arXiv:2310.18651): its benchmarks, measured here and published, whole or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from patchssl.eval.records import Result
from patchssl.report.tables.build import NOT_RUN, make_frames
from patchssl.report.tables.cost import CostRecord, cost_frames
from patchssl.report.tables.published import only_named_so, plain_name
from patchssl.report.tables.render import write_frames
from patchssl.report.tables.scores import METHODS, NONE, Column, Row, Score, collect_scores
from patchssl.runtime.errors import DataError

# title -> (task, dataset, protocol, metric) of its columns
PAPER: dict[str, list[tuple[str, str, str, str]]] = {
    "Classification of frozen features": [
        (task, dataset, "dino", metric) for dataset in ("cifar10", "imagenet100", "imagenet1k")
        for task, metric in (("knn", "top1@20"), ("linear", "top1"))],
    "Copy detection on Copydays": [("copydays", "copydays", "dino", "strong/map")],
    "Retrieval on revisited Oxford and Paris": [
        (task, task, protocol, f"{level}/map") for task in ("roxford5k", "rparis6k") for protocol in ("dino", "ibot")
        for level in ("medium", "hard")],
}
UNAVAILABLE = "unavailable.txt"
NO_DATA = "data not available"
PAPER_METHODS = ("pwself", "dino", "ibot")


def read_unavailable(root: Path) -> dict[str, str]:
    """The datasets that `root`/unavailable.txt says could not be had, each with the reason: lines of NAME: REASON.

    Empty without such a file; DataError for one that cannot be read.
    """
    path = root / UNAVAILABLE
    if not path.is_file():
        return {}
    try:
        lines = [line.partition(":") for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    return {plain_name(name): reason.strip() or "no reason stated" for name, _, reason in lines if name.strip()}


def paper_frames(results: Sequence[Result],
                 unavailable: Mapping[str, str] | None = None) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """Title -> table with rows PW-Self, DINO, iBOT as measured and as published, and the numbers behind all of them.

    A column that no record fills stands there all the same, under the protocol the published numbers have; it says so
    where `unavailable` has the reason why its dataset could not be had. Records on images that only have the name of
    one of these sets are left out.
    """
    unavailable = unavailable or {}
    of_methods = [result for result in results if result.method in PAPER_METHODS]
    of_paper = [result for result in of_methods if not only_named_so(result)]
    others = sorted({result.dataset for result in of_methods if only_named_so(result)})
    scores = [score for task in sorted({key[0] for keys in PAPER.values() for key in keys})
              for score in collect_scores(of_paper, task)]
    frames, numbers = {}, []
    for title, keys in PAPER.items():
        columns = [column for key in keys for column in _columns(key, scores)]
        shown = [score for score in scores if score.column in columns]
        filled = {score.column for score in shown}
        empty = {column: NO_DATA for column in columns if column not in filled
                 and plain_name(column.dataset) in unavailable}
        frame, table = make_frames(shown, columns, _rows(shown), results, empty)
        reasons = dict.fromkeys(f"{c.dataset}: {unavailable[plain_name(c.dataset)]}" for c in empty)
        frame.attrs["notes"][:0] = ([f"{NOT_RUN}: there is no such record among those read."]
                                    if len(empty) < len(columns) else []) + (
                                        [f"{NO_DATA}, as {UNAVAILABLE} says: {'; '.join(reasons)}."] if empty else [])
        if others:
            frame.attrs["notes"].append(f"Records on other images that are called {', '.join(others)} are left out, by "
                                        "how many they are.")
        frames[title] = frame
        numbers.append(table)
    return frames, pd.concat([table.astype(object) for table in numbers], ignore_index=True)


def write_paper(results: Sequence[Result], out_dir: Path, stem: str = "paper", *,
                costs: Sequence[CostRecord] = (), unavailable: Mapping[str, str] | None = None) -> list[Path]:
    """Write STEM.md and STEM.tex, with what an update costs, and STEM.csv to `out_dir`; see `paper_frames`."""
    frames, numbers = paper_frames(results, unavailable)
    return write_frames(frames | cost_frames(costs), [numbers], out_dir, stem)


def _columns(key: tuple[str, str, str, str], scores: Sequence[Score]) -> list[Column]:
    """The columns of the records that `key` means, one per fingerprint, or one without any."""
    task, dataset, protocol, metric = key
    found = {c for c in {score.column for score in scores}
             if (c.task, plain_name(c.dataset), c.protocol, c.metric) == key}
    return sorted(found) or [Column(task, dataset, protocol, metric, "", "")]


def _rows(scores: Sequence[Score]) -> list[Row]:
    """The measured rows, and one for every method of the paper without any."""
    rows = {score.row for score in scores}
    labels = {row.label for row in rows}
    known = list(METHODS)
    missing = {Row(known.index(name), METHODS[name], NONE, NONE) for name in PAPER_METHODS
               if METHODS[name] not in labels}
    return sorted(rows | missing)
