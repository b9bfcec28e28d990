"""Sheets of the views that a network is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

from patchssl.report.plots.canvas import STYLE, Pixels, new_figure, save


class Sheet(NamedTuple):
    """A row of a sheet of views: pixels (H, W, 3) uint8 and the words below each."""

    images: Sequence[Pixels]
    captions: Sequence[str]


def plot_views(sheets: Sequence[Sheet], path: Path | str) -> Path:
    """A sheet of views, one row per image, each view with its caption; rows may differ in length."""
    columns = max(len(sheet.images) for sheet in sheets)
    cell = min(1.45, 12 / columns)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(cell * columns, (cell + 0.22) * len(sheets))
        grid = figure.subplots(len(sheets), columns, squeeze=False)
        for sheet, line in zip(sheets, grid, strict=True):
            for axes in line:
                axes.set_axis_off()
            for axes, image, caption in zip(line, sheet.images, sheet.captions, strict=False):
                axes.imshow(image)
                axes.set_title(caption, loc="center", fontsize=7.5 if cell > 1.2 else 6.5, pad=3)
        return save(figure, path)
