"""Robustness: mAP of copy detection against JPEG quality and the share cut away, with the strong copies beside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from patchssl.report.plots.canvas import LINES, STYLE, new_figure, save, shown_name
from patchssl.report.plots.library import figure_style
from patchssl.report.tables.robustness import Curve, Robustness, intervals_in, titles_of
from patchssl.report.tables.scores import NONE, Row, Score
from patchssl.runtime.errors import UsageError

MOST_CURVES = 14  # more could not be told apart: seven colors, solid and dashed
WIDEST_OF_TWO = 58  # characters of a label of which two fit side by side
MARKERS = "osD^vP*"  # one per color, so that color is not all that tells curves apart
Look = tuple[str, str, str]  # color, line style, marker


def plot_robustness(settings: Sequence[Robustness], path: Path | str) -> Path:
    """One line of panels per dataset and protocol: JPEG quality, share cut away, and the strong copies.

    Means over networks with their 95 % interval where a curve has several. Of more than 14 rows those best on the
    strong copies are drawn, and the figure says so. UsageError where there is nothing to draw.
    """
    if not settings:
        raise UsageError("there is nothing to draw: no record is of Copydays or a set in its layout; make one with: "
                         "patchssl eval copydays MODEL --data DIR")
    chosen = [_strongest(setting.curves) for setting in settings]
    rows = sorted({curve.row for curves in chosen for curve in curves})
    looks = dict(zip(rows, _looks(len(rows)), strict=True))
    with figure_style(STYLE):
        shown = {curve.row: curve for curves in chosen for curve in curves}
        labels = [_label(shown[row]) for row in rows]
        columns = 2 if len(rows) > 1 and max(map(len, labels)) <= WIDEST_OF_TWO else 1
        figure = new_figure(7.2, 2.75 * len(settings) + 0.2 * math.ceil(len(rows) / columns) + 0.2)
        grid = figure.subplots(len(settings), 3, squeeze=False, sharey="row", width_ratios=[3, 3, 1.3])
        for setting, curves, line, title in zip(settings, chosen, grid, titles_of(settings, shown_name), strict=True):
            _draw_line(line, curves, looks)
            left_out = f": {len(curves)} of {len(setting.curves)} models" if len(curves) < len(setting.curves) else ""
            line[0].set_title(title + left_out)
        handles = [Line2D([], [], color=color, linestyle=style, marker=marker, markersize=4)
                   for color, style, marker in looks.values()]
        said = intervals_in(score for curves in chosen for curve in curves for score in curve.scores())
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, title=said or None)
        return save(figure, path)


def _strongest(curves: Sequence[Curve]) -> list[Curve]:
    """At most MOST_CURVES of `curves`, in their order: those with the best mAP on the strong copies."""
    best = sorted(curves, key=lambda curve: -(curve.strong.mean if curve.strong else -1.0))[:MOST_CURVES]
    return [curve for curve in curves if curve in best]


def _looks(count: int) -> list[Look]:
    """`count` ways to draw a line; they repeat after every color was had in every style."""
    styles = [(color, style, marker) for style, (color, marker) in
              product(("-", "--", ":", "-."), zip(LINES, MARKERS, strict=True))]
    return [styles[i % len(styles)] for i in range(count)]


def _draw_line(line: Sequence[Axes], curves: Sequence[Curve], looks: Mapping[Row, Look]) -> None:
    """The three panels of one dataset and protocol."""
    jpeg, crops, strong = line
    for curve in curves:
        look = looks[curve.row]
        _draw_curve(jpeg, curve.jpeg, look)
        _draw_curve(crops, curve.crops, look)
    for place, curve in enumerate(curves):
        if curve.strong is not None:
            _draw_point(strong, place, curve.strong, looks[curve.row])
    qualities = sorted({quality for curve in curves for quality in curve.jpeg})
    percents = sorted({percent for curve in curves for percent in curve.crops})
    jpeg.set(xlabel="JPEG quality (lower: harder)", ylabel="mAP (%)", ylim=(_floor(curves), 103))
    if qualities:
        jpeg.set_xscale("log")
    jpeg.xaxis.set_major_locator(FixedLocator(qualities))
    jpeg.xaxis.set_minor_locator(NullLocator())
    jpeg.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    crops.set(xlabel="area cut away (%)")
    crops.xaxis.set_major_locator(FixedLocator(percents))
    strong.set(xlabel="strong copies", xlim=(-0.8, max(len(curves), 2) - 0.2))
    strong.xaxis.set_major_locator(NullLocator())


def _draw_curve(axes: Axes, points: Mapping[int, Score], look: Look) -> None:
    color, style, marker = look
    places, means, bounds = list(points), [100 * s.mean for s in points.values()], _bounds(list(points.values()))
    axes.plot(places, means, color=color, linestyle=style, marker=marker, markersize=3.5)
    if len(points) > 1:
        axes.fill_between(places, bounds[0], bounds[1], color=color, alpha=0.15, linewidth=0)


def _draw_point(axes: Axes, place: int, score: Score, look: Look) -> None:
    color, _, marker = look
    low, high = _bounds([score])
    if low[0] < high[0]:
        axes.plot([place, place], [low[0], high[0]], color=color, linewidth=1.2)
    axes.plot([place], [100 * score.mean], color=color, marker=marker, markersize=5, linestyle="none")


def _floor(curves: Sequence[Curve]) -> float:
    """Where the axis of mAP begins: a multiple of ten below all that is drawn."""
    scores = [score for curve in curves for score in curve.scores()]
    return max(-3.0, 10.0 * math.floor((_bounds(scores).min() - 5) / 10)) if scores else -3.0


def _bounds(scores: Sequence[Score]) -> np.ndarray:
    """(2, N) lower and upper ends in percent, inside what is possible; the mean itself where there is no interval."""
    ends = [(s.mean if s.low is None else s.low, s.mean if s.high is None else s.high) for s in scores]
    return 100 * np.array(ends, dtype=float).reshape(-1, 2).T.clip(0, 1)


def _label(curve: Curve) -> str:
    row = curve.row
    words = [row.label, *(part for part in (row.arch, row.pretraining) if part not in (NONE, "untrained"))]
    count = f"; n = {curve.n}" if curve.n > 1 else ""
    return shown_name(", ".join(words), most=96) + count
