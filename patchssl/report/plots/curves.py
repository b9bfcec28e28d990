"""Training curves: loss, k-NN, entropies and effective rank of a run, or of several."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from patchssl.report.plots.canvas import (
    BLUE,
    GRAY,
    GREEN,
    LINES,
    ORANGE,
    PURPLE,
    RED,
    STYLE,
    new_figure,
    save,
    shown_name,
)
from patchssl.report.plots.library import figure_style
from patchssl.runtime.errors import UsageError
from patchssl.runtime.progress import LogRows

Runs = Mapping[str, LogRows]  # by name, the one the figure is about first


def plot_curves(log: LogRows, path: Path | str, *, references: Mapping[str, float] | None = None,
                others: Mapping[str, LogRows] | None = None, num_prototypes: int | None = None,
                name: str = "this run") -> Path:
    """Loss, k-NN, entropies and effective rank of a run over its epochs.

    `references` are accuracies in [0, 1] drawn as lines beside the k-NN curve (raw pixels, a random network),
    `others` logs of other runs, drawn in every panel by one line each, and `name` what this one is called beside
    them; `num_prototypes` places the line of uniform targets. Panels without a number in the log are skipped;
    UsageError if none is left, or for more runs than there are colors.
    """
    runs = {name: log, **(others or {})}
    if len(runs) > len(LINES):
        raise UsageError(f"{len(runs)} runs in one figure cannot be told apart; {len(LINES)} are the most")
    drawn: dict[str, Callable[[Axes], None]] = {
        "loss": lambda axes: _draw_loss(axes, runs),
        "knn_top1": lambda axes: _draw_knn(axes, runs, references or {}),
        "teacher_entropy": lambda axes: _draw_entropy(axes, runs, num_prototypes),
        "effective_rank": lambda axes: _draw_rank(axes, runs)}
    panels = [draw for key, draw in drawn.items() if _has(log, key)]
    if not panels:
        raise UsageError(f"there is nothing to draw: the log has {len(log)} rows, and no loss, k-NN, entropy "
                         "or rank in them")
    columns = 2 if len(panels) > 1 else 1
    ends = (row["epoch"] for rows in runs.values() for row in rows if "epoch" in row)
    rows, end = math.ceil(len(panels) / columns), 1.02 * max(ends, default=1)
    with figure_style(STYLE):
        figure = new_figure(3.6 * columns, 2.5 * rows)
        for i, draw in enumerate(panels):
            axes = figure.add_subplot(rows, columns, i + 1)
            draw(axes)
            axes.set_xlim(0, end)
            if i >= len(panels) - columns:
                axes.set_xlabel("epoch")
        if len(runs) > 1 and not _has(log, "knn_top1"):
            figure.axes[0].legend()
        return save(figure, path)


def _draw_loss(axes: Axes, runs: Runs) -> None:
    [log, *others] = runs.values()
    split = not others and _has(log, "patch_loss") and any(row.get("patch_loss") for row in log)
    if split:
        for key, label, color in (("loss", "total", BLUE), ("class_loss", "class tokens", ORANGE),
                                  ("patch_loss", "matched patches", GREEN)):
            _curve(axes, log, key, label, color)
    else:
        _draw_runs(axes, runs, "loss")
    axes.set(title="Loss", ylabel="cross-entropy (nats)")
    if split:
        axes.legend()


def _draw_knn(axes: Axes, runs: Runs, references: Mapping[str, float]) -> None:
    _draw_runs(axes, runs, "knn_top1", scale=100, markers=True)
    colors = (RED, GRAY, GREEN) if len(runs) == 1 else (GRAY,) * 3
    styles = zip(("--", ":", "-."), colors, strict=True)
    for (name, share), (style, color) in zip(references.items(), styles, strict=False):
        axes.axhline(100 * share, color=color, linestyle=style, linewidth=1.2, label=shown_name(name))
    axes.set(title="k-NN of training images", ylabel="top-1 accuracy (%)")
    axes.legend()


def _draw_entropy(axes: Axes, runs: Runs, num_prototypes: int | None) -> None:
    [log, *others] = runs.values()
    if others:
        _draw_runs(axes, runs, "teacher_entropy")
    else:
        _curve(axes, log, "teacher_entropy", "class tokens", BLUE)
        if any(row.get("patch_entropy") for row in log):
            _curve(axes, log, "patch_entropy", "patch tokens", GREEN)
        if _has(log, "marginal_entropy"):
            _curve(axes, log, "marginal_entropy", "mean over images", PURPLE)
    if num_prototypes:
        top = math.log(num_prototypes)
        axes.axhline(top, color=GRAY, linestyle="--", linewidth=1.1)
        axes.annotate(f"uniform: ln K = {top:.2f}", (0.01, top), xycoords=("axes fraction", "data"),
                      xytext=(0, -2), textcoords="offset points", va="top", fontsize=8, color=GRAY)
    whose = " (class tokens)" if others else ""
    axes.set(title=f"Entropy of the teacher's targets{whose}", ylabel="entropy (nats)")
    axes.set_ylim(bottom=0)
    if len(axes.get_lines()) > 1 and not others:
        axes.legend()


def _draw_rank(axes: Axes, runs: Runs) -> None:
    _draw_runs(axes, runs, "effective_rank")
    axes.set(title="Effective rank of the class tokens", ylabel="effective rank")
    axes.set_ylim(bottom=0)


def _draw_runs(axes: Axes, runs: Runs, key: str, *, scale: float = 1.0, markers: bool = False) -> None:
    """One line per run, in the color that it has in every panel."""
    for (name, rows), color, marker in zip(runs.items(), LINES, "osD^vP*", strict=False):
        _curve(axes, rows, key, shown_name(name), color, scale=scale, marker=marker if markers else "")


def _curve(axes: Axes, log: LogRows, key: str, label: str, color: str, *, scale: float = 1.0,
           marker: str = "") -> None:
    """One line over the rows that have `key`; more than 200 points are pale, below their running mean."""
    found = [(row["epoch"], scale * row[key]) for row in log if "epoch" in row and row.get(key) is not None]
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
