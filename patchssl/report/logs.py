"""A run as tables and the page show it: its log, what it was, and what its last row says of its health.

Whatever lies in the folder is read as far as it can be: damaged rows are counted and skipped, values that cannot be
drawn are dropped, and what cannot be told stands among the problems. (The run itself reads its log by
`pretrain.run.log`, which keeps rows as they are.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from patchssl.eval.naming import fault_of, shown_name
from patchssl.pretrain.health import collapse_warnings
from patchssl.pretrain.run.log import LOG
from patchssl.pretrain.run.resume import read_run
from patchssl.runtime.errors import DataError, PatchSSLError
from patchssl.runtime.files import read_regular

_LARGEST_LOG = 256 * 2**20
_LARGEST = 1e99  # what is more, or infinite, or no number, cannot be drawn


@dataclass(frozen=True)
class RunLog:
    """A run's log rows, what it was, and sentences on what of it is damaged."""

    name: str
    rows: tuple[dict[str, Any], ...]
    facts: tuple[tuple[str, str], ...]  # in words
    warnings: tuple[str, ...]  # of collapse
    problems: tuple[str, ...]


def read_run_log(folder: Path) -> RunLog:
    """The log of the run in `folder`, as far as it can be read; DataError where no row can."""
    path, problems = folder / LOG, []
    try:
        if path.stat().st_size > _LARGEST_LOG:
            raise DataError(f"{path} is larger than {_LARGEST_LOG // 2**20} MiB: no log of a run")
        lines = read_regular(path, _LARGEST_LOG).decode("utf-8", "replace").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    rows = [_row(line) for line in lines]
    whole = tuple(row for row in rows if row is not None)
    bad = len(rows) - len(whole) - (bool(rows) and rows[-1] is None)  # a kill cuts the last line short
    if not whole:
        raise DataError(f"{path} has no row that can be read")
    if bad:
        problems.append(f"{bad:,} of {len(rows):,} rows of {path} are damaged and left out")
    facts, warnings = _results_in(whole), list[str]()
    try:
        recipe, told = read_run(folder)
        facts = [("method", recipe.method), ("data", str(told.get("data"))), ("seed", str(told.get("seed"))),
                 ("epochs", f"{recipe.optim.epochs:g}"), ("prototypes", f"{recipe.head.num_prototypes:,}"), *facts,
                 ("device", str(told.get("device")))]
        facts += [("versions", ", ".join(f"{name} {version}" for name, version in sorted(told["versions"].items())))
                  ] if isinstance(told.get("versions"), dict) else []
        warnings = list(collapse_warnings(
            whole[-1], recipe.head.num_prototypes, num_tokens=recipe.optim.batch_size * recipe.views.num_global,
            best_rank=max(row.get("effective_rank", 0.0) for row in whole)).values())
    except (PatchSSLError, OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        problems.append(f"what kind of run {folder} was cannot be read: {error}")
    except KeyError as error:
        problems.append(f"the health of {folder} cannot be judged: its log lacks {error}")
    facts = [(name, text) for name, text in facts if not fault_of(text)]
    return RunLog(shown_name(folder.name), whole, tuple(facts), tuple(warnings), tuple(problems))


def _row(line: str) -> dict[str, Any] | None:
    """The finite numbers of a row of a log; None for a damaged one."""
    try:
        row = json.loads(line)
        kept = {key: value for key, value in row.items() if isinstance(value, int | float) and abs(value) < _LARGEST}
    except (ValueError, AttributeError, OverflowError, RecursionError):
        return None
    return kept if "epoch" in kept else None


def _results_in(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What the last row says, in words."""
    last = rows[-1]
    knn = [row["knn_top1"] for row in rows if "knn_top1" in row]
    facts = [("updates", f"{last['step']:,.0f}")] if "step" in last else []
    facts += [("training time", f"{last['seconds']:,.0f} s")] if "seconds" in last else []
    facts += [("last loss", f"{last['loss']:.3f} nats")] if "loss" in last else []
    facts += [("last k-NN, on training images", f"{knn[-1]:.1%}")] if knn else []
    facts += [("speed", f"{last['images_per_second']:,.0f} images/s")] if "images_per_second" in last else []
    facts += [("unreadable images", f"{last['unreadable_images']:,.0f}")] if last.get("unreadable_images") else []
    return facts
