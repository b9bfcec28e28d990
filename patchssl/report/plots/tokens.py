"""Patches that a network takes for the same: lines between two images, one row of panels per network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import FigureBase
from matplotlib.lines import Line2D
from matplotlib.patches import ConnectionPatch

from patchssl.report.plots.canvas import BLUE, GREEN, RED, STYLE, Pixels, bare, new_figure, padding_note, save
from patchssl.report.plots.library import figure_style
from patchssl.report.plots.matches import Overlap, draw_crops, place_colors
from patchssl.runtime.errors import UsageError, unknown_choice

COLORINGS = ("right", "similarity", "place")
# by verdict: wrong, a neighbor, right; lines and markers differ, so that color is not all that tells them apart
VERDICTS = (("wrong patch", RED, ":", "X"), ("neighbor of the right patch", GREEN, "--", "s"),
            ("right patch", BLUE, "-", "o"))


class MatchedPair(NamedTuple):
    """What one network matches between two images (H, W, 3) uint8, best first."""

    title: str
    images: tuple[Pixels, Pixels]
    grids: tuple[tuple[int, int], tuple[int, int]]  # rows and columns of patches of each
    patch_size: int
    ids: tuple[np.ndarray, np.ndarray]  # (M,) row-major patches of each
    similarity: np.ndarray  # (M,) cosines
    verdicts: np.ndarray | None = None  # (M,) places in VERDICTS, where geometry is known


def plot_token_matches(pairs: Sequence[MatchedPair], path: Path | str, *, names: tuple[str, str],
                       color: str | None = None, lines: int = 30, source: Overlap | None = None) -> Path:
    """A row of two panels per network with lines between the best `lines` matches; with `source` its crops beside.

    `color` says what a line's color means: whether it is right (default where geometry is known), the cosine
    similarity of its tokens, or its place in the first image. UsageError for another, or for right where it is unknown.
    """
    known = all(pair.verdicts is not None for pair in pairs)
    coloring = color or ("right" if known else "similarity")
    if coloring not in COLORINGS:
        raise UsageError(unknown_choice("--color", coloring, COLORINGS))
    if coloring == "right" and not known:
        raise UsageError("which matches are right is known for two views of one image only; choose --color similarity "
                         "or place")
    ratio = max(image.shape[0] / image.shape[1] for pair in pairs for image in pair.images)
    cell = 2.7 / max(1.0, ratio / 1.5)
    with figure_style(STYLE):
        figure = new_figure((3.2 if source else 0.4) + 2.6 * cell, (cell * ratio + 0.75) * len(pairs) + 0.3)
        right: FigureBase = figure
        if source:
            left, right = np.asarray(figure.subfigures(1, 2, width_ratios=[3.0, 2.6 * cell])).tolist()
            area = left.add_subplot()
            area.set_anchor("N")
            draw_crops(area, source, names, columns=1)
        grid = right.subplots(len(pairs), 2, squeeze=False)
        for pair, line in zip(pairs, grid, strict=True):
            _draw_pair(line, pair, names, coloring, lines)
        if coloring == "right":
            right.legend([Line2D([], [], color=tone, linestyle=style, marker=marker, markersize=4)
                          for _, tone, style, marker in reversed(VERDICTS)], [name for name, *_ in reversed(VERDICTS)],
                         loc="outside lower center", ncols=3)
        elif coloring == "place":
            right.supxlabel(f"color: place in the {names[0]}", fontsize=8)
        return save(figure, path)


def _draw_pair(line: Sequence[Axes], pair: MatchedPair, names: tuple[str, str], coloring: str, lines: int) -> None:
    for axes, image, grid, name in zip(line, pair.images, pair.grids, names, strict=True):
        axes.imshow(image, extent=(0, image.shape[1], image.shape[0], 0))
        axes.set_anchor("N")  # tops level, as the title of the first reaches over the second
        bare(axes)
        padding = padding_note(image, grid, pair.patch_size).replace("\n", " ")
        axes.set_xlabel(f"{name}, {grid[0]} × {grid[1]} patches of {pair.patch_size} px"
                        + (f"\n{padding}" if padding else ""), fontsize=7.5)
    line[0].set_title(pair.title, fontsize=8.5)
    looks = _looks(line, pair, coloring)
    for first, second, (color, style, marker) in reversed(list(zip(*pair.ids, looks, strict=True))[:lines]):
        ends = [_center(int(patch), grid, image, pair.patch_size)
                for patch, grid, image in zip((first, second), pair.grids, pair.images, strict=True)]
        # added to the figure, so that it lies above both panels
        line[1].figure.add_artist(ConnectionPatch(ends[0], ends[1], "data", "data", axesA=line[0], axesB=line[1],
                                                  linewidth=1.2, linestyle=style, color=color, alpha=0.85))
        for axes, end in zip(line, ends, strict=True):
            axes.plot(*end, marker=marker, markersize=4.5, color=color, markeredgecolor="white", markeredgewidth=0.6)


def _looks(line: Sequence[Axes], pair: MatchedPair, coloring: str) -> list[tuple[Any, str, str]]:
    """Color, line style and marker of every match."""
    if coloring == "right" and pair.verdicts is not None:
        return [VERDICTS[int(verdict)][1:] for verdict in pair.verdicts]
    if coloring == "place":
        colors = place_colors(pair.ids[0], pair.grids[0][1])
        return [(colors[int(patch)], "-", "o") for patch in pair.ids[0]]
    scale = ScalarMappable(Normalize(*_similarity_range(pair.similarity)), "viridis")
    bar = line[1].figure.colorbar(scale, ax=list(line), fraction=0.03, pad=0.02, aspect=18, panchor=False)
    bar.set_label("cosine similarity", fontsize=7.5)
    bar.ax.tick_params(labelsize=7)
    return [(scale.to_rgba(value), "-", "o") for value in pair.similarity]


def _similarity_range(similarity: np.ndarray) -> tuple[float, float]:
    """Ends of the color scale: those of the cosines, at least 0.02 apart and never beyond 1, which none can pass."""
    if not len(similarity):
        return 0.0, 1.0
    high = min(1.0, float(similarity.max()))
    return min(float(similarity.min()), high - 0.02), high


def _center(patch: int, grid: tuple[int, int], image: Pixels, patch_size: int) -> tuple[float, float]:
    """Center (x, y) in pixels of the part of a patch that lies inside the image."""
    row, column = divmod(patch, grid[1])
    bottom, right = (min((at + 1) * patch_size, length) for at, length in ((row, image.shape[0]),
                                                                           (column, image.shape[1])))
    return (column * patch_size + right) / 2, (row * patch_size + bottom) / 2
