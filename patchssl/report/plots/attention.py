"""Attention maps beside the image that they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from patchssl.report.plots.canvas import STYLE, Pixels, bare, new_figure, save

MIN_SPAN = 1.0  # of an attention map's color scale, in units of uniform attention


def plot_attention(rows: Sequence[tuple[Pixels, np.ndarray]], path: Path | str, *,
                   titles: Sequence[str] | None = None) -> Path:
    """Attention of the class token to the patches: per image the image, the mean over heads, and each head.

    Each row is an image (H, W, 3) uint8 as the network saw it and its attention (heads, grid rows, grid
    columns), shares in [0, 1]. Drawn in units of uniform attention: 2 is twice an average patch's share. One
    scale per image, from the 0.5th to the 99.5th percentile, but never so fine that nearly uniform attention
    looks structured. All rows have the same number of heads.
    """
    heads = {attention.shape[0] for _, attention in rows}
    if len(heads) != 1:
        raise ValueError(f"rows of one figure have one number of heads, these have {sorted(heads)}")
    num_heads = heads.pop()
    columns, ratio = 2 + num_heads, max(image.shape[0] / image.shape[1] for image, _ in rows)
    cell = min(1.5, 11 / columns)
    names = ["image", "mean of heads", *(f"head {i + 1}" for i in range(num_heads))]
    with matplotlib.rc_context(STYLE):
        figure = new_figure(cell * columns + 0.7, cell * ratio * len(rows) + 0.35)
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for (image, attention), line in zip(rows, grid, strict=True):
            _draw_attention(figure, line, image, attention)
        for axes, name in zip(grid[0], names, strict=True):
            axes.set_title(name, loc="center", fontsize=8.5 if cell > 1.1 else 7.5)
        for line, name in zip(grid, titles or (), strict=bool(titles)):
            line[0].set_ylabel(name)
        return save(figure, path)


def _draw_attention(figure: Figure, line: Sequence[Axes], image: Pixels, attention: np.ndarray) -> None:
    height, width = image.shape[:2]
    relative = attention * (attention.shape[1] * attention.shape[2])
    maps = [relative.mean(0), *relative]
    low, high = np.percentile(np.stack(maps), [0.5, 99.5])
    spare = max(0.0, MIN_SPAN - (high - low)) / 2
    low, high = max(0.0, low - spare), high + spare
    for axes in line:
        bare(axes)
    line[0].imshow(image)
    shown = [axes.imshow(values, cmap="viridis", vmin=low, vmax=high, extent=(0, width, height, 0))
             for axes, values in zip(line[1:], maps, strict=True)]
    bar = figure.colorbar(shown[0], ax=list(line), fraction=0.02, pad=0.01, aspect=12, extend="both")
    bar.set_label("× uniform", fontsize=7)
    bar.ax.tick_params(labelsize=7)
