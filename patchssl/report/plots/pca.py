"""Patch tokens as colors, of one network or of several below each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from patchssl.report.plots.canvas import STYLE, Pixels, bare, grid_extent, new_figure, padding_note, save, shown_name
from patchssl.report.plots.library import figure_style

PER_BAND = 6  # images side by side
_PER_LINE = 24  # characters of a name beside a row


def plot_components(images: Sequence[tuple[Pixels, np.ndarray]], path: Path | str, *,
                    shares: Sequence[float] | np.ndarray, patch_size: int | None = None, name: str = "",
                    others: Mapping[str, ColoredTokens] | None = None) -> Path:
    """Each image above the colors of its patch tokens, as large as the image; up to six images side by side.

    An image is pixels (H, W, 3) uint8 and colors (grid rows, grid columns, 3) in [0, 1]; `shares` of the variance are
    those of the components that red, green and blue stand for, fewer where there are less. A grid of `patch_size`
    pixels may be larger than the image, which was padded then and is labeled so. `others` are further networks by
    their names, of the same images, `name` is that of the first.
    """
    networks = {name: (images, shares, patch_size), **(others or {})}
    columns, bands = min(PER_BAND, len(images)), math.ceil(len(images) / PER_BAND)
    lines = 1 + len(networks)
    ratio = max(image.shape[0] / image.shape[1] for image, _ in images)
    cell = min(2.4, 12 / columns)
    with figure_style(STYLE):
        figure = new_figure(max(3.6, cell * columns), lines * cell * min(ratio, 3) * bands + 0.25 + 0.2 * len(networks))
        grid = figure.subplots(lines * bands, columns, squeeze=False)
        for axes in grid.flat:
            bare(axes)
        for number, (image, _) in enumerate(images):
            band, column = divmod(number, PER_BAND)
            grid[lines * band, column].imshow(image, extent=(0, image.shape[1], image.shape[0], 0))
            for line, (drawn, _, size) in enumerate(networks.values(), 1):
                seen, colors = drawn[number]
                axes = grid[lines * band + line, column]
                # in pixels of what this network saw, whose size may be another
                axes.imshow(colors, extent=grid_extent(seen, colors.shape[:2], size))
                axes.set(xlim=(0, seen.shape[1]), ylim=(seen.shape[0], 0))
                axes.set_xlabel(padding_note(seen, colors.shape[:2], size).replace("\n", " "), fontsize=6.5)
                if column == 0 and len(networks) > 1:
                    axes.set_ylabel(_in_lines(list(networks)[line - 1]), fontsize=7.5)
        figure.suptitle("principal components of the patch tokens, share of variance:\n" + "\n".join(
            (f"{shown_name(named)}: " if len(networks) > 1 else "") + _percents(drawn_shares)
            for named, (_, drawn_shares, _) in networks.items()), fontsize=9.5)
        return save(figure, path)


# images with their colors, shares of the variance, patch size
ColoredTokens = tuple[Sequence[tuple[Pixels, np.ndarray]], "Sequence[float] | np.ndarray", "int | None"]


def _in_lines(name: str) -> str:
    """A name that stands beside its row, in lines that are no longer than the row is high."""
    shown = shown_name(name, most=3 * _PER_LINE)
    return "\n".join(shown[at : at + _PER_LINE] for at in range(0, len(shown), _PER_LINE))


def _percents(shares: Sequence[float] | np.ndarray) -> str:
    return ", ".join(f"{color} {share:.0%}" for color, share in zip(("red", "green", "blue"), shares, strict=False))
