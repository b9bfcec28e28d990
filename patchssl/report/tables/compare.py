"""Two models side by side: for every task both were scored on, how much they differ, how surely, and where most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from patchssl.eval.records import Result, read_result, read_result_files
from patchssl.eval.tasks import table_metrics
from patchssl.report.tables.build import differing_settings
from patchssl.report.tables.stats import RESAMPLES, paired_difference, per_query, query_names
from patchssl.runtime.errors import DataError, UsageError, unknown_choice


class Moved(NamedTuple):
    """A query or a class, and its values; `gap` is second minus first."""

    name: str
    first: float
    second: float

    @property
    def gap(self) -> float:
        return self.second - self.first


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One metric of one task on one dataset, fractions; without detail per query, `low`, `high` and `p` are None."""

    task: str
    dataset: str
    protocol: str
    metric: str
    first: float
    second: float
    difference: float  # second minus first
    num: int | None  # queries or test images
    low: float | None
    high: float | None
    p: float | None
    why: str  # why there is no interval
    moved_by: str  # "class" or "query"
    moved: tuple[Moved, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What two models differ in, and what could not be compared, with the reasons."""

    first: str
    second: str
    seed: int
    rows: tuple[Compared, ...]
    left_out: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; fractions."""
        rows = [{**asdict(row), "moved": [{**moved._asdict(), "difference": moved.gap} for moved in row.moved]}
                for row in self.rows]
        return {"first": self.first, "second": self.second, "seed": self.seed, "resamples": RESAMPLES, "rows": rows,
                "left_out": list(self.left_out)}

    def as_text(self) -> str:
        """A line per metric, in percent, and what moved most below it."""
        lines = [f"A  {self.first}", f"B  {self.second}", ""]
        for head, rows in _by_cell(self.rows).items():
            lines += [head, *(line for row in rows for line in _lines(row)), ""]
        lines += ["B - A in points. Interval: 95 % of the paired bootstrap over test images or queries; p: random sign",
                  f"flips of the paired differences ({RESAMPLES:,} each, seed {self.seed}). Both speak of these two "
                  "networks,", "not of other training seeds, and p is not corrected for the number of metrics."]
        return "\n".join([*lines, *(f"skipped: {sentence}" for sentence in self.left_out)])


class NetworkRecords(NamedTuple):
    """The records of one network, and a sentence for every file on the way that could not be read."""

    records: list[Result]
    problems: list[str]


def find_records(name: str, root: Path) -> NetworkRecords:
    """The records of one network: a record file, a folder of records, or a model's or folder's name below `root`.

    UsageError where nothing has that name or more than one network has; DataError for a damaged file.
    """
    path = Path(name)
    if path.is_file():
        return NetworkRecords([read_result(path)], [])
    known, problems = read_result_files(root) if root.is_dir() else ({}, [])
    found = {file: record for file, record in known.items() if name in (record.model, _lies_in(file, record))}
    if not found and path.is_dir():
        found, problems = read_result_files(path)
        if not found:
            raise UsageError(f"{path} holds no result records that can be read" + "".join(f"; {p}" for p in problems))
    if not found:
        unread = f"; {len(problems)} files below {root} could not be read: {problems[0]}" if problems else ""
        raise UsageError((unknown_choice("model", name, {record.model for record in known.values()}) if known else
                          f"'{name}' is no record file or folder, and {root} holds no records; name another --results")
                         + unread)
    networks = sorted({_lies_in(file, record) for file, record in found.items()})
    if len(networks) > 1:
        raise UsageError(f"'{name}' means {len(networks)} networks; name one of them: {', '.join(networks[:20])}")
    return NetworkRecords([*found.values()], problems)


def compare(first: Sequence[Result], second: Sequence[Result], *, seed: int = 0, num_moved: int = 5) -> Comparison:
    """Every metric both networks have under one protocol on the same images, second minus first.

    `seed` fixes the resampling; `num_moved` queries or classes are named. DataError, with the reasons, where there is
    nothing that can be compared by its queries or test images.
    """
    rows, reasons = [], []
    theirs = _by_protocol(second)
    ours = _by_protocol(first)
    for key in sorted({*ours, *theirs}):
        a, b = ours.get(key), theirs.get(key)
        if a is None or b is None:
            present = b or a
            assert present is not None
            reasons.append(f"{_cell_name(present)}: only {'B' if a is None else 'A'} has a record of it")
        elif problem := _unlike(a, b):
            reasons.append(f"{_cell_name(a)}: {problem}")
        else:
            rows += _compared(a, b, seed, num_moved)
    names = _name(first), _name(second)
    if all(row.p is None for row in rows):
        reasons += [f"{row.task} on {row.dataset} ({row.protocol}), {row.metric}: {row.why}" for row in rows]
        raise DataError(f"{names[0]} and {names[1]} cannot be compared: {'; '.join(reasons)}")
    return Comparison(first=names[0], second=names[1], seed=seed, rows=tuple(rows), left_out=tuple(reasons))


def _compared(a: Result, b: Result, seed: int, num_moved: int) -> list[Compared]:
    """The metrics with detail per query, and the headline metrics without."""
    shared = [metric for metric in a.metrics if metric in b.metrics]
    rows = []
    for metric in sorted(shared, key=lambda name: _metric_order(a.task, name)):
        values = per_query(a, metric), per_query(b, metric)
        why = _why_not(values)
        if why and metric not in table_metrics().get(a.task, ()):
            continue
        known: dict[str, Any] = {"num": None, "low": None, "high": None, "p": None}
        moved_by, moved = "", tuple[Moved, ...]()
        if values[0] is not None and values[1] is not None and not why:
            found = paired_difference(values[0], values[1], seed=seed)
            known = {"num": found.num, "low": found.low, "high": found.high, "p": found.p}
            moved_by, moved = _moved(a, b, metric, (values[0], values[1]), num_moved)
        x, y = a.metrics[metric], b.metrics[metric]
        rows.append(Compared(task=a.task, dataset=a.dataset, protocol=a.protocol, metric=metric, first=x, second=y,
                             difference=y - x, why=why, moved_by=moved_by, moved=moved, **known))
    return rows


def _why_not(values: tuple[np.ndarray | None, np.ndarray | None]) -> str:
    lacking = [name for name, found in zip("AB", values, strict=True) if found is None]
    if lacking:
        return f"no interval: no detail per query or test image in {' and '.join(lacking)}"
    a, b = values
    if a is None or b is None or a.shape != b.shape or (np.isnan(a) != np.isnan(b)).any():
        return "no interval: A and B have detail on different queries"
    return ""


def _moved(a: Result, b: Result, metric: str, values: tuple[np.ndarray, np.ndarray],
           num: int) -> tuple[str, tuple[Moved, ...]]:
    """What changed most, largest first: classes of a classification, else queries."""
    shares = a.detail.get("class_accuracy"), b.detail.get("class_accuracy")
    if isinstance(shares[0], dict) and isinstance(shares[1], dict):
        kind = "class"
        found = [Moved(name, float(shares[0][name]), float(shares[1][name])) for name in shares[0]
                 if name in shares[1] and _is_share(shares[0][name]) and _is_share(shares[1][name])]
    else:
        kind = "query"
        names = query_names(a, metric, len(values[0]))
        found = [Moved(name, float(x), float(y)) for name, x, y in zip(names, *values, strict=True)
                 if not math.isnan(x)]
    changed = [moved for moved in found if moved.gap]
    return kind, tuple(sorted(changed, key=lambda moved: (-abs(moved.gap), moved.name))[:num])


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


def _unlike(a: Result, b: Result) -> str:
    """Why the numbers of two records must not be compared; empty where they may."""
    if a.dataset_fingerprint != b.dataset_fingerprint:
        return (f"the images are not the same (fingerprints {a.dataset_fingerprint[:8]} and "
                f"{b.dataset_fingerprint[:8]}){_older(a, b)}")
    if a.protocol_fingerprint != b.protocol_fingerprint:
        return f"the protocols are not the same, they differ in {differing_settings([a, b])}"
    return ""


def _older(a: Result, b: Result) -> str:
    """What to do where one of two records knows its images by the first formula, which looked at no content."""
    before = [record for record in (a, b) if "fingerprints_cover" not in record.detail]
    return "" if len(before) != 1 else (f"; the record of {_name(before)} is of a version that knew images by names "
                                        "and sizes alone: score it again")


def _by_protocol(records: Sequence[Result]) -> dict[tuple[str, str, str], Result]:
    found: dict[tuple[str, str, str], Result] = {}
    for record in records:
        key = (record.task, record.dataset, record.protocol)
        if key in found and found[key] != record:
            raise UsageError(f"{_name([record])} has two records of {_cell_name(record)}; name one file")
        found[key] = record
    return found


def _metric_order(task: str, metric: str) -> tuple[bool, list[str | int], str]:
    """Headline metrics first, then blocks by their numbers: jpegqual/3 before jpegqual/10."""
    parts = [f"{int(part):09d}" if part.isdecimal() and len(part) < 9 else part for part in metric.split("/")]
    return metric not in table_metrics().get(task, ()), [*parts], metric


def _by_cell(rows: Sequence[Compared]) -> dict[str, list[Compared]]:
    found: dict[str, list[Compared]] = {}
    for row in rows:
        found.setdefault(f"{row.task} on {row.dataset}, protocol {row.protocol}", []).append(row)
    return found


def _lines(row: Compared) -> list[str]:
    numbers = f"A {100 * row.first:5.1f}  B {100 * row.second:5.1f}  B - A {100 * row.difference:+6.1f}"
    start = f"  {row.metric:<14} {numbers}"
    if row.p is None or row.low is None or row.high is None:
        return [f"{start}  {row.why}"]
    least = "<= " if row.p <= 1 / RESAMPLES else ""
    lines = [f"{start}  [{100 * row.low:+.1f}, {100 * row.high:+.1f}]  p {least}{row.p:.4f}  n = {row.num:,}"]
    if row.moved:
        parts = ", ".join(f"{moved.name} {100 * moved.gap:+.1f}" for moved in row.moved)
        lines.append(f"    moved most, by {row.moved_by}: {parts}")
    return lines


def _name(records: Sequence[Result]) -> str:
    return f"{records[0].model} ({_folder(records[0])})"


def _folder(record: Result) -> str:
    """The folder that a record is written to, which tells weights of one name apart."""
    return record.path(Path()).parent.name


def _lies_in(file: Path, record: Result) -> str:
    """The name of the folder of `file` where that tells networks of equal weights apart, else as `_folder`."""
    folder = _folder(record)
    return file.parent.name if file.parent.name.startswith(f"{folder}-") else folder


def _cell_name(record: Result) -> str:
    return f"{record.task} on {record.dataset} ({record.protocol})"
