"""Attention maps beside the image that they belong to, and the patches that hold most of their mass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from patchssl.report.plots.canvas import STYLE, Pixels, bare, grid_extent, new_figure, padding_note, save
from patchssl.report.plots.library import figure_style

MIN_SPAN = 1.0  # of an attention map's color scale, in units of uniform attention
DIMMED = (1.0, 1.0, 1.0, 0.78)  # over patches outside the mass
COLORS = "viridis"
CLOSE = {f"figure.constrained_layout.{name}": 0.02 for name in ("w_pad", "h_pad", "wspace", "hspace")}


def plot_attention(rows: Sequence[tuple[Pixels, np.ndarray]], path: Path | str, *, titles: Sequence[str] | None = None,
                   patch_size: int | None = None, mass: float = 0.6) -> Path:
    """Attention of the class token to the patches: per image the mean over heads and each head, in two lines.

    Each row is an image (H, W, 3) uint8 and its attention (heads, grid rows, grid columns), shares in [0, 1]. Above,
    maps in units of uniform attention: 2 is twice an average patch's share. One scale per image, from the 0.5th to
    the 99.5th percentile, but never so fine that nearly uniform attention looks structured. Below, over the image,
    the fewest patches that hold the share `mass` of it. A grid of `patch_size` pixels that is larger than the image
    was padded, which is said below the image; None: the grid spans the image. All rows have as many heads.
    """
    heads = {attention.shape[0] for _, attention in rows}
    if len(heads) != 1:
        raise ValueError(f"rows of one figure have one number of heads, these have {sorted(heads)}")
    columns, ratios = 2 + heads.pop(), [image.shape[0] / image.shape[1] for image, _ in rows]
    cell = min(1.5, 11 / columns)
    names = ["image", "mean of heads", *(f"head {i + 1}" for i in range(columns - 2))]
    with figure_style({**STYLE, **CLOSE}):
        figure = new_figure(cell * columns + 0.7, 2 * cell * sum(ratios) + 0.45 * len(rows) + 0.35)
        grid = figure.subplots(2 * len(rows), columns, squeeze=False,
                               height_ratios=[ratio for ratio in ratios for _ in range(2)])
        for number, (image, attention) in enumerate(rows):
            lines = grid[2 * number], grid[2 * number + 1]
            shown = _draw_maps(lines[0], image, attention, patch_size)
            _draw_masses(lines[1], image, attention, patch_size, mass, shown.get_clim())
            bar = figure.colorbar(shown, ax=np.concatenate(lines).tolist(), fraction=0.02, pad=0.01, aspect=24,
                                  extend="both")
            bar.set_label("× uniform", fontsize=7)
            bar.ax.tick_params(labelsize=7)
        for axes, name in zip(grid[0], names, strict=True):
            axes.set_title(name, loc="center", fontsize=8.5 if cell > 1.1 else 7.5)
        for line, name in zip(grid[::2], titles or (), strict=bool(titles)):
            line[0].set_ylabel(name)
        return save(figure, path)


def largest_mass(attention: np.ndarray, share: float) -> np.ndarray:
    """Which patches of a map (rows, columns) are the fewest that hold `share` of its sum; of equal ones the first.

    The rule of `--threshold` in facebookresearch/dino, visualize_attention.py.

    >>> largest_mass(np.array([[0.1, 0.5], [0.1, 0.3]]), 0.6).tolist()
    [[False, True], [False, True]]
    """
    if not 0 < share <= 1:
        raise ValueError(f"a share of the mass lies above 0 and up to 1, {share} does not")
    values = attention.astype(np.float64).ravel()
    order = np.argsort(-values, kind="stable")
    held = np.cumsum(values[order])
    count = int(np.searchsorted(held, share * held[-1] * (1 - 1e-12))) + 1  # sums round, equal ones should be equal
    mask = np.zeros(len(values), dtype=bool)
    mask[order[:count]] = True
    return mask.reshape(attention.shape)


def attention_range(relative: np.ndarray) -> tuple[float, float]:
    """Ends of the color scale of maps (..., rows, columns) in units of uniform attention."""
    low, high = np.percentile(relative, [0.5, 99.5])
    spare = max(0.0, MIN_SPAN - (high - low)) / 2
    return max(0.0, float(low) - spare), float(high) + spare


def _mean_and_heads(attention: np.ndarray) -> np.ndarray:
    return np.concatenate([attention.mean(0, keepdims=True), attention])


def _draw_maps(line: Sequence[Axes], image: Pixels, attention: np.ndarray, patch_size: int | None) -> AxesImage:
    """The image, the mean of heads and each head, all in the color scale of the picture that is returned."""
    relative = _mean_and_heads(attention) * (attention.shape[1] * attention.shape[2])
    low, high = attention_range(relative)
    for axes in line:
        bare(axes)
    line[0].imshow(image, extent=(0, image.shape[1], image.shape[0], 0))
    line[0].set_xlabel(padding_note(image, attention.shape[1:], patch_size), fontsize=6.5)
    shown = [_show(axes, values, image, patch_size, cmap=COLORS, vmin=low, vmax=high)
             for axes, values in zip(line[1:], relative, strict=True)]
    return shown[0]


def _draw_masses(line: Sequence[Axes], image: Pixels, attention: np.ndarray, patch_size: int | None,
                 mass: float, scale: tuple[float, float]) -> None:
    """The mean over the image, then the image where the patches that hold `mass` are, the others dimmed."""
    gray = image.mean(-1).round().astype(np.uint8)[..., None].repeat(3, -1)  # so that every color comes from the scale
    for axes, below in zip(line, (gray, *[image] * (len(line) - 1)), strict=True):
        bare(axes)
        axes.imshow(below, extent=(0, image.shape[1], image.shape[0], 0))
    relative = attention.mean(0) * (attention.shape[1] * attention.shape[2])
    _show(line[0], relative, image, patch_size, cmap=COLORS, alpha=0.6, vmin=scale[0], vmax=scale[1])
    line[0].set_xlabel("mean, overlaid", fontsize=6.5)
    for place, (axes, values) in enumerate(zip(line[1:], _mean_and_heads(attention), strict=True)):
        mask = largest_mass(values, mass)
        _show(axes, np.where(mask[..., None], 0.0, DIMMED), image, patch_size)
        patches = f"{mass:.0%} of mass in\n{mask.mean():.0%} of patches" if place == 0 else f"{mask.mean():.0%}"
        axes.set_xlabel(patches, fontsize=6.5)


def _show(axes: Axes, values: np.ndarray, image: Pixels, patch_size: int | None, **looks: Any) -> AxesImage:
    """A grid of patches at its place over the image; what lies beyond the image is cut off."""
    shown = axes.imshow(values, extent=grid_extent(image, values.shape[:2], patch_size), **looks)
    axes.set(xlim=(0, image.shape[1]), ylim=(image.shape[0], 0))
    return shown
