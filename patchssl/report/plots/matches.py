"""Matched patches of two views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from patchssl.report.plots.canvas import BLUE, ORANGE, STYLE, Pixels, bare, new_figure, save
from patchssl.report.plots.library import figure_style
from patchssl.views.geometry import View, patches_per_side

# corners of the square that gives a patch its color: top left, top right, bottom left, bottom right
CORNERS = np.array([[[0.05, 0.55, 0.95], [1.00, 0.90, 0.10]], [[0.60, 0.10, 0.80], [0.95, 0.25, 0.05]]])
MAX_NUMBERED = 60  # numbers of more matches could not be read
_NAMES = ("teacher view", "student view")


class Overlap(NamedTuple):
    """The source image (H, W, 3) uint8 of two views and where both were cut."""

    image: Pixels
    view_a: View
    view_b: View


def plot_matches(view_a: Pixels, view_b: Pixels, ids_a: Sequence[int] | np.ndarray,
                 ids_b: Sequence[int] | np.ndarray, patch_size: int, path: Path | str, *,
                 overlap: Overlap | None = None) -> Path:
    """Which patches of two views show the same place: same color and, up to 60 places, same number.

    `view_a` (S, S, 3) and `view_b` (s, s, 3) uint8; `ids_a[i]` and `ids_b[i]` are the patches of match i,
    row-major. A color says where in `view_a` a patch lies; patches without a match are dimmed. `overlap` adds
    a panel with the source image and both crops.
    """
    first, second = np.asarray(ids_a, dtype=np.int64), np.asarray(ids_b, dtype=np.int64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"ids of matched patches come in pairs, there are {first.shape} and {second.shape}")
    sides = [patches_per_side(view.shape[0], patch_size) for view in (view_a, view_b)]
    panels = 3 if overlap else 2
    numbers = {int(patch): number for number, patch in enumerate(np.unique(first), 1)}
    numbered, palette = len(numbers) <= MAX_NUMBERED, place_colors(first, sides[0])
    with figure_style(STYLE):
        figure = new_figure(3.2 * panels, 3.8)
        axes = list(figure.subplots(1, panels, width_ratios=[1.25, 1, 1] if overlap else None))
        if overlap:
            draw_crops(axes.pop(0), overlap, _NAMES)
        for area, view, side, own in zip(axes, (view_a, view_b), sides, (first, second), strict=True):
            labels = {int(i): numbers[int(a)] for i, a in zip(own, first, strict=True)}
            colors = {int(i): palette[int(a)] for i, a in zip(own, first, strict=True)}
            _draw_patches(area, view, side, colors, labels if numbered else {})
        for area, view, name, side in zip(axes, (view_a, view_b), _NAMES, sides, strict=True):
            area.set_title(f"{name}, {view.shape[1]} px, {side} x {side} patches", loc="center")
        figure.suptitle(f"{len(second)} of {sides[1] ** 2} patches of the {_NAMES[1]} matched, with "
                        f"{len(numbers)} of {sides[0] ** 2} of the {_NAMES[0]}", fontsize=10.5)
        return save(figure, path)


def place_colors(patches: np.ndarray, side: int) -> dict[int, np.ndarray]:
    """A color for each of `patches` of a side x side grid: neighbors differ a little, far corners a lot."""
    place = np.stack(np.divmod(np.unique(patches), side), axis=-1).astype(float)
    if not len(place):
        return {}
    share = (place - place.min(0)) / np.maximum(np.ptp(place, axis=0), 1)
    down, right = share[:, :1], share[:, 1:]
    top, bottom = (left_end * (1 - right) + right_end * right for left_end, right_end in CORNERS)
    return dict(zip(np.unique(patches).tolist(), top * (1 - down) + bottom * down, strict=True))


def _draw_patches(axes: Axes, view: Pixels, side: int, colors: Mapping[int, np.ndarray],
                  numbers: Mapping[int, int]) -> None:
    """A view with its grid: matched patches tinted, framed and numbered, the others dimmed."""
    tint = np.ones((side * side, 4)) * (1, 1, 1, 0.5)
    for patch, color in colors.items():
        tint[patch] = (*color, 0.22)
    axes.imshow(view, extent=(0, side, side, 0))
    axes.imshow(tint.reshape(side, side, 4), extent=(0, side, side, 0))
    for patch, color in colors.items():
        row, column = divmod(patch, side)
        axes.add_patch(Rectangle((column + 0.03, row + 0.03), 0.94, 0.94, fill=False, edgecolor=color,
                                 linewidth=2))
    for patch, number in numbers.items():
        axes.text(*_middle(patch, side), str(number), ha="center", va="center", color="white", weight="bold",
                  fontsize=min(9.0, 75 / side),
                  bbox={"facecolor": "black", "alpha": 0.5, "pad": 0.8, "linewidth": 0})
    axes.set(xlim=(0, side), ylim=(side, 0))
    bare(axes)


def _middle(patch: int, side: int) -> tuple[float, float]:
    """Center (x, y) of a patch in units of patches."""
    row, column = divmod(patch, side)
    return column + 0.5, row + 0.5


def draw_crops(axes: Axes, overlap: Overlap, names: Sequence[str], columns: int = 2) -> None:
    """The source image with the rectangles of both views, named in a legend below it."""
    axes.imshow(overlap.image)
    views, styles = (overlap.view_a, overlap.view_b), ((BLUE, "-"), (ORANGE, "--"))
    for view, name, (color, style) in zip(views, names, styles, strict=True):
        label = f"{name}{' (mirrored)' if view.mirrored else ''}"
        corner = (view.left - 0.5, view.top - 0.5)  # imshow puts pixel centers at whole numbers
        axes.add_patch(Rectangle(corner, view.width, view.height, fill=False, edgecolor=color,
                                 linestyle=style, linewidth=2.2, label=label))
    bare(axes)
    axes.set_title("source image and crops", loc="center")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=columns)
