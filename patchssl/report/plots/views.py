"""Sheets of the views that a network is trained on."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes

from patchssl.report.plots.canvas import STYLE, Pixels, new_figure, save
from patchssl.report.plots.library import figure_style

LINE = 20  # letters of a line of words in a cell


class Sheet(NamedTuple):
    """A row of a sheet of views: in each cell pixels (H, W, 3) uint8 or words, and the caption above it."""

    images: Sequence[Pixels | str]
    captions: Sequence[str]


def plot_views(sheets: Sequence[Sheet], path: Path | str, title: str = "") -> Path:
    """A sheet of views, one row per image, each view with its caption; rows may differ in length."""
    columns = max(len(sheet.images) for sheet in sheets)
    cell = min(1.45, 12 / columns)
    lines = sum(max(caption.count("\n") + bool(caption) for caption in sheet.captions) for sheet in sheets)
    with figure_style(STYLE):
        figure = new_figure(cell * columns, (cell + 0.08) * len(sheets) + 0.14 * lines + (0.3 if title else 0))
        grid = figure.subplots(len(sheets), columns, squeeze=False)
        for sheet, line in zip(sheets, grid, strict=True):
            for axes in line:
                axes.set_axis_off()
            for axes, image, caption in zip(line, sheet.images, sheet.captions, strict=False):
                _fill(axes, image)
                axes.set_title(caption, loc="center", fontsize=7.5 if cell > 1.2 else 6.5, pad=3)
        if title:
            figure.suptitle(title, fontsize=9.5)
        return save(figure, path)


def _fill(axes: Axes, image: Pixels | str) -> None:
    """Show the pixels, or the words right beside the next cell, in lines short enough for this one."""
    if isinstance(image, str):
        words = "\n".join(textwrap.fill(line, LINE) for line in image.splitlines())
        axes.text(1, 0.5, words, ha="right", va="center", fontsize=8, transform=axes.transAxes)
    else:
        axes.imshow(image)
