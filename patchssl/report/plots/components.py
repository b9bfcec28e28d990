"""Patch tokens as colors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from patchssl.report.plots.canvas import STYLE, Pixels, bare, new_figure, save

PER_BAND = 6  # images side by side


def plot_components(images: Sequence[tuple[Pixels, np.ndarray]], path: Path | str, *,
                    shares: Sequence[float] | np.ndarray) -> Path:
    """Each image above the colors of its patch tokens, as large as the image; up to six images side by side.

    An image is pixels (H, W, 3) uint8 as the network saw it and colors (grid rows, grid columns, 3) in [0, 1];
    `shares` of the variance are those of the components that red, green and blue stand for, fewer where there are less.
    """
    columns, bands = min(PER_BAND, len(images)), math.ceil(len(images) / PER_BAND)
    ratio = max(image.shape[0] / image.shape[1] for image, _ in images)
    cell = min(2.4, 12 / columns)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(max(3.6, cell * columns), 2 * cell * min(ratio, 3) * bands + 0.4)
        grid = figure.subplots(2 * bands, columns, squeeze=False)
        for axes in grid.flat:
            bare(axes)
        for number, (image, colors) in enumerate(images):
            band, column = divmod(number, PER_BAND)
            height, width = image.shape[:2]
            grid[2 * band, column].imshow(image)
            grid[2 * band + 1, column].imshow(colors, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
        named = [f"{name} {share:.0%}" for name, share in zip(("red", "green", "blue"), shares, strict=False)]
        figure.suptitle(f"principal components of the patch tokens\n(share of variance: {', '.join(named)})",
                        fontsize=9.5)
        return save(figure, path)
