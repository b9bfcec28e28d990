"""Runs as a page shows them: their logs, curves and what their last rows say of their health."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from patchssl.pretrain.run.log import LOG
from patchssl.report.logs import RunLog
from patchssl.report.page.charts import Chart, Points, line_chart
from patchssl.runtime.errors import UsageError

_NATS = "nats"


class Panel(NamedTuple):
    """A chart of a run: columns of its log with their words; `scale` as 100 for percent."""

    title: str
    unit: str
    columns: Mapping[str, str]
    scale: float = 1.0
    floor: float | None = 0.0


PANELS = (
    Panel("Loss", _NATS, {"loss": "total", "class_loss": "class tokens", "patch_loss": "patches"}, floor=None),
    Panel("k-NN of training images by others, which it trains on", "top-1, %", {"knn_top1": "20-NN"}, 100.0),
    Panel("Entropy of the targets", _NATS, {"teacher_entropy": "class tokens", "patch_entropy": "patches",
                                            "marginal_entropy": "mean over images"}),
    Panel("How far the student is from the teacher", f"KL, {_NATS}", {"class_kl": "class tokens",
                                                                     "patch_kl": "patches"}),
    Panel("Effective rank of the class tokens", "rank", {"effective_rank": "class tokens"}),
    Panel("Spread of the features", "distance from the mean", {"feature_spread": "class tokens"}),
    Panel("Student patches with a match", "%", {"matched_share_global": "global views",
                                                "matched_share_local": "local views"}, 100.0),
    Panel("Gradient", "norm", {"grad_norm": "all parameters"}),
)
COMPARED = ("loss", "knn_top1", "effective_rank", "teacher_entropy")  # over all runs together


class TrainingSection(NamedTuple):
    """A run as a template needs it."""

    log: RunLog
    charts: Sequence[Chart]


def run_folders(places: Iterable[Path]) -> list[Path]:
    """The run folders that `places` are or hold, by name; UsageError for one without any."""
    found: dict[Path, None] = {}
    for place in places:
        here = [place] if (place / LOG).is_file() else sorted(
            folder for folder in place.iterdir() if (folder / LOG).is_file()) if place.is_dir() else []
        if not here:
            raise UsageError(f"--runs {place} is no run folder that has logged yet, nor a folder of such: there is no "
                             f"{LOG}")
        found |= dict.fromkeys(here)
    return list(found)


def charts_of(log: RunLog) -> list[Chart]:
    """The panels of one run that its log has numbers for."""
    charts = []
    for panel in PANELS:
        lines = {label: _points(log.rows, key, panel.scale) for key, label in panel.columns.items()}
        shown: dict[str, Points] = {}
        for label, points in lines.items():
            if any(y for _, y in points) and points not in shown.values():  # the whole loss may be one term's
                shown[label] = points
        if chart := line_chart(panel.title, "epoch", panel.unit, shown, floor=panel.floor):
            charts.append(chart)
    return charts


def compared(logs: Sequence[RunLog]) -> list[Chart]:
    """One chart per main number, a line per run; none for a single run."""
    if len(logs) < 2:
        return []
    charts = []
    for panel in PANELS:
        key = next(iter(panel.columns))
        if key in COMPARED:
            lines = {log.name: _points(log.rows, key, panel.scale) for log in logs}
            if chart := line_chart(panel.title, "epoch", panel.unit, lines, floor=panel.floor):
                charts.append(chart)
    return charts


def _points(rows: Sequence[Mapping[str, Any]], key: str, scale: float) -> Points:
    return sorted(((float(row["epoch"]), scale * float(row[key])) for row in rows if key in row), key=lambda at: at[0])
