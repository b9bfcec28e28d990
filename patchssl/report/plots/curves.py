"""Training curves: loss, k-NN, entropies and effective rank of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from patchssl.errors import UsageError
from patchssl.report.plots.canvas import BLUE, GRAY, GREEN, ORANGE, PURPLE, RED, SKY, STYLE, new_figure, save

LogRows = Sequence[Mapping[str, Any]]


def plot_curves(log: LogRows, path: Path | str, *, x: str = "epoch",
                references: Mapping[str, float] | None = None, others: Mapping[str, LogRows] | None = None,
                num_prototypes: int | None = None, title: str = "") -> Path:
    """Loss, k-NN, entropies and effective rank of a run over `x` ("epoch", "seconds" or "step").

    `references` are accuracies in [0, 1] drawn as lines beside the k-NN curve (raw pixels, a random network),
    `others` logs of other runs whose k-NN curve is drawn too; `num_prototypes` places the line of uniform
    targets. Panels without a number in the log are left out; UsageError if none is left.
    """
    panels: list[Callable[[Axes], None]] = []
    if _has(log, "loss"):
        panels.append(lambda axes: _draw_loss(axes, log, x))
    if _has(log, "knn_top1"):
        panels.append(lambda axes: _draw_knn(axes, log, x, references or {}, others or {}))
    if _has(log, "teacher_entropy"):
        panels.append(lambda axes: _draw_entropy(axes, log, x, num_prototypes))
    if _has(log, "effective_rank"):
        panels.append(lambda axes: _draw_rank(axes, log, x))
    if not panels:
        raise UsageError(f"there is nothing to draw: the log has {len(log)} rows, and no loss, k-NN, entropy "
                         "or rank in them")
    columns = 2 if len(panels) > 1 else 1
    rows, end = math.ceil(len(panels) / columns), 1.02 * max((row[x] for row in log if x in row), default=1)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(3.6 * columns, 2.5 * rows + (0.3 if title else 0))
        for i, draw in enumerate(panels):
            axes = figure.add_subplot(rows, columns, i + 1)
            draw(axes)
            axes.set_xlim(0, end)
            if i >= len(panels) - columns:
                axes.set_xlabel({"seconds": "training time (s)", "step": "update"}.get(x, x))
        if title:
            figure.suptitle(title, fontsize=10.5)
        return save(figure, path)


def _draw_loss(axes: Axes, log: LogRows, x: str) -> None:
    split = _has(log, "patch_loss") and any(row.get("patch_loss") for row in log)
    names = [("loss", "total", BLUE)]
    if split:
        names += [("class_loss", "class tokens", ORANGE), ("patch_loss", "matched patches", GREEN)]
    for key, label, color in names:
        _curve(axes, log, x, key, label, color)
    axes.set(title="Loss", ylabel="cross-entropy (nats)")
    if split:
        axes.legend()


def _draw_knn(axes: Axes, log: LogRows, x: str, references: Mapping[str, float],
              others: Mapping[str, LogRows]) -> None:
    _curve(axes, log, x, "knn_top1", "this run", BLUE, scale=100, marker="o")
    for (name, rows), color in zip(others.items(), (ORANGE, PURPLE, SKY), strict=False):
        _curve(axes, rows, x, "knn_top1", name, color, scale=100, marker="s")
    styles = (("--", RED), (":", GRAY), ("-.", GREEN))
    for (name, share), (style, color) in zip(references.items(), styles, strict=False):
        axes.axhline(100 * share, color=color, linestyle=style, linewidth=1.2, label=name)
    axes.set(title="k-NN during training", ylabel="top-1 accuracy (%)")
    axes.legend()


def _draw_entropy(axes: Axes, log: LogRows, x: str, num_prototypes: int | None) -> None:
    _curve(axes, log, x, "teacher_entropy", "class tokens", BLUE)
    if any(row.get("patch_entropy") for row in log):
        _curve(axes, log, x, "patch_entropy", "patch tokens", GREEN)
    if _has(log, "marginal_entropy"):
        _curve(axes, log, x, "marginal_entropy", "mean over images", PURPLE)
    if num_prototypes:
        top = math.log(num_prototypes)
        axes.axhline(top, color=GRAY, linestyle="--", linewidth=1.1)
        axes.annotate(f"uniform: ln K = {top:.2f}", (0.01, top), xycoords=("axes fraction", "data"),
                      xytext=(0, -2), textcoords="offset points", va="top", fontsize=8, color=GRAY)
    axes.set(title="Entropy of the teacher's targets", ylabel="entropy (nats)")
    axes.set_ylim(bottom=0)
    if len(axes.get_lines()) > 1:
        axes.legend()


def _draw_rank(axes: Axes, log: LogRows, x: str) -> None:
    _curve(axes, log, x, "effective_rank", "", BLUE)
    axes.set(title="Effective rank of the class tokens", ylabel="effective rank")
    axes.set_ylim(bottom=0)


def _curve(axes: Axes, log: LogRows, x: str, key: str, label: str, color: str, *, scale: float = 1.0,
           marker: str = "") -> None:
    """One line over the rows that have `key`; more than 200 points are pale, below their running mean."""
    found = [(row[x], scale * row[key]) for row in log if x in row and row.get(key) is not None]
    points = np.array(found, dtype=float)
    if not len(points):
        return
    if len(points) > 200:
        axes.plot(*points.T, color=color, alpha=0.25, linewidth=0.8)
        window = len(points) // 50
        smooth = np.convolve(points[:, 1], np.full(window, 1 / window), mode="valid")
        points = np.stack([points[window - 1 :, 0], smooth], axis=1)
    dot = marker or ("o" if len(points) == 1 else "")  # a line through one point is invisible
    axes.plot(*points.T, color=color, label=label or None, marker=dot, markersize=3.5)


def _has(log: LogRows, key: str) -> bool:
    return any(row.get(key) is not None for row in log)
