"""Differences of variants to a reference, paired by seed: every seed's, their mean and its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from patchssl.report.plots.canvas import BLUE, GRAY, STYLE, new_figure, save, shown_name
from patchssl.report.plots.library import figure_style
from patchssl.runtime.errors import UsageError


@dataclass(frozen=True)
class Gap:
    """Variant minus reference in one measure, fractions: mean, interval where there is one, and each seed's."""

    variant: str
    mean: float
    low: float | None
    high: float | None
    by_seed: Sequence[float]
    significant: bool


@dataclass(frozen=True)
class GapPanel:
    """The gaps of one measure, and what the reference reached in it (fraction)."""

    title: str
    reference: float
    gaps: Sequence[Gap]


def plot_differences(panels: Sequence[GapPanel], reference: str, path: Path | str, *, note: str = "") -> Path:
    """One panel per measure, a line per variant: small circles are seeds, the bar is the 95 % interval of the mean.

    What is significant is filled. `note` stands below. UsageError where there is nothing to draw.
    """
    variants = list(dict.fromkeys(gap.variant for panel in panels for gap in panel.gaps))
    if not variants:
        raise UsageError("there is nothing to draw: no variant has a seed in common with the reference")
    with figure_style(STYLE):
        figure = new_figure(1.3 + 1.75 * len(panels), 1.1 + 0.34 * len(variants))
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
            _draw_panel(axes, panel, variants)
            title = panel.title.replace(", ", ",\n")
            axes.set_title(f"{title}\n{reference}: {100 * panel.reference:.1f} %")
        axes.set_yticks(range(len(variants)), [shown_name(name) for name in variants])
        axes.set_ylim(len(variants) - 0.5, -0.5)
        figure.supxlabel(f"points more than {reference}" + (f"; {note}" if note else ""), fontsize=8)
        return save(figure, path)


def _draw_panel(axes: Axes, panel: GapPanel, variants: Sequence[str]) -> None:
    axes.axvline(0, color=GRAY, linewidth=0.9)
    for gap in panel.gaps:
        line = variants.index(gap.variant)
        axes.plot([100 * value for value in gap.by_seed], [line] * len(gap.by_seed), "o", color=GRAY, markersize=2.5,
                  markerfacecolor="none", markeredgewidth=0.6)
        if gap.low is not None and gap.high is not None:
            axes.plot([100 * gap.low, 100 * gap.high], [line, line], color=BLUE, linewidth=1.4)
        axes.plot([100 * gap.mean], [line], "o", color=BLUE, markersize=5,
                  markerfacecolor=BLUE if gap.significant else "white")
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.grid(visible=False, axis="y")
