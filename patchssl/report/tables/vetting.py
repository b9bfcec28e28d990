"""Which records tables, figures and pages skip because what they call themselves was made to harm a reader.

Every value is escaped where it is shown all the same; a record that tries is not to be trusted with its numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from patchssl.eval.naming import fault_of, leads_out
from patchssl.eval.records import Result, read_result_files
from patchssl.report.tables.cost import CostRecord, read_costs

_DEEPEST = 8  # settings within settings
_MOST_STRINGS = 2_000  # of protocol, metrics and versions


def valid_records(results: Path) -> tuple[dict[Path, Result], list[str]]:
    """The records below `results` that can be shown, by their files, and a sentence for each of the others."""
    found, problems = read_result_files(results)
    objections = {path: objection(record) for path, record in found.items()}
    problems += [f"{path} is left out: {reason}" for path, reason in objections.items() if reason]
    return {path: record for path, record in found.items() if not objections[path]}, problems


def valid_costs(results: Path) -> tuple[list[CostRecord], list[str]]:
    """As `valid_records`, the records of costs."""
    costs, problems = read_costs(results)
    objections = [cost_objection(cost) for cost in costs]
    problems += [f"a record of costs in {results} is left out: {reason}" for reason in objections if reason]
    return [cost for cost, reason in zip(costs, objections, strict=True) if not reason], problems


def objection(record: Result) -> str | None:
    """Why `record` is skipped: its names hold HTML, control characters or paths upwards, or no end; None: sound."""
    if _depth(record.protocol_settings) > _DEEPEST:
        return f"its protocol settings are nested more than {_DEEPEST} deep"
    for number, (what, text) in enumerate(_shown(record)):
        if number >= _MOST_STRINGS:
            return f"it has more than {_MOST_STRINGS:,} metrics, settings and versions"
        if fault := fault_of(text):
            return f"its {what} {fault}"
    for what in ("model", "task", "dataset", "protocol"):
        if leads_out(getattr(record, what)):
            return f"its {what} is a path that leads out of its folder"
    return None


def cost_objection(cost: CostRecord) -> str | None:
    """As `objection`, of a record of costs."""
    words = {"architecture": cost.arch, "views": cost.views, "device": cost.device,
             "version of torch": cost.versions.get("torch") or ""}
    words |= {f"method {number}": f"{step.method}, {step.way}" for number, step in enumerate(cost.steps, 1)}
    return next((f"its {what} {fault}" for what, text in words.items() if (fault := fault_of(text))), None)


def _shown(record: Result) -> Iterator[tuple[str, str]]:
    """What a page shows of a record, its gallery excepted."""
    for what in ("model", "variant", "method", "arch", "pretrain_data", "task", "dataset", "protocol", "device"):
        yield what, getattr(record, what) or ""
    for metric in record.metrics:
        yield "metric", metric
    for name, version in record.versions.items():
        yield "version", f"{name} {version or ''}"
    yield from (("protocol setting", text) for text in _texts(record.protocol_settings))


def _depth(value: Any) -> int:
    """How deep plain JSON values are nested, as far as it matters; without recursion, which has an end."""
    layer, depth = [value], 0
    while depth <= _DEEPEST and (layer := [inner for outer in layer if isinstance(outer, dict | list | tuple)
                                           for inner in (outer.values() if isinstance(outer, dict) else outer)]):
        depth += 1
    return depth


def _texts(value: Any) -> Iterator[str]:
    """All strings in plain JSON values."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
    else:
        yield str(value)
