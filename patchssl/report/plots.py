"""Figures: training curves, attention maps, colored tokens, matched patches, views; nothing else names matplotlib.

Every function takes plain arrays, writes one file and returns its path; the suffix chooses the format (.png,
.svg, .pdf and what else matplotlib knows). No figure outlives its function. Colors of lines are Okabe and
Ito's, which color-blind readers tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle

from patchssl.errors import UsageError
from patchssl.geometry import View, patches_per_side

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GRAY = "#CC79A7", "#56B4E9", "#6B6B6B"
# corners of the square that gives a patch its color: top left, top right, bottom left, bottom right
CORNERS = np.array([[[0.05, 0.55, 0.95], [1.00, 0.90, 0.10]], [[0.60, 0.10, 0.80], [0.95, 0.25, 0.05]]])
STYLE = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9,
    "axes.titlesize": 9.5, "axes.labelsize": 9, "legend.fontsize": 8,
    "xtick.labelsize": 8, "ytick.labelsize": 8,
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.6, "lines.linewidth": 1.6,
    "legend.framealpha": 0.85, "legend.edgecolor": "none", "image.interpolation": "nearest",
    "savefig.dpi": 200, "savefig.bbox": "tight", "savefig.pad_inches": 0.05, "svg.hashsalt": "patchssl",
}
MAX_NUMBERED = 60  # numbers of more matches could not be read
PER_BAND = 6  # images side by side
MIN_SPAN = 1.0  # of an attention map's color scale, in units of uniform attention
LogRows = Sequence[Mapping[str, Any]]
Pixels = np.ndarray  # (H, W, 3) uint8


class Sheet(NamedTuple):
    """A row of a sheet of views: pixels (H, W, 3) uint8 and the words below each."""

    images: Sequence[Pixels]
    captions: Sequence[str]


class Overlap(NamedTuple):
    """The source image (H, W, 3) uint8 of two views and where both were cut."""

    image: Pixels
    view_a: View
    view_b: View


def plot_curves(log: LogRows, path: Path | str, *, x: str = "epoch",
                references: Mapping[str, float] | None = None, others: Mapping[str, LogRows] | None = None,
                num_prototypes: int | None = None, title: str = "") -> Path:
    """Loss, k-NN, entropies and effective rank of a run over `x` ("epoch", "seconds" or "step").

    `references` are accuracies in [0, 1] drawn as lines beside the k-NN curve (raw pixels, a random network),
    `others` logs of other runs whose k-NN curve is drawn too; `num_prototypes` places the line of uniform
    targets. Panels without a number in the log are left out; UsageError if none is left.
    """
    panels: list[Callable[[Axes], None]] = []
    if _has(log, "loss"):
        panels.append(lambda axes: _draw_loss(axes, log, x))
    if _has(log, "knn_top1"):
        panels.append(lambda axes: _draw_knn(axes, log, x, references or {}, others or {}))
    if _has(log, "teacher_entropy"):
        panels.append(lambda axes: _draw_entropy(axes, log, x, num_prototypes))
    if _has(log, "effective_rank"):
        panels.append(lambda axes: _draw_rank(axes, log, x))
    if not panels:
        raise UsageError(f"there is nothing to draw: the log has {len(log)} rows, and no loss, k-NN, entropy "
                         "or rank in them")
    columns = 2 if len(panels) > 1 else 1
    rows, end = math.ceil(len(panels) / columns), 1.02 * max((row[x] for row in log if x in row), default=1)
    with matplotlib.rc_context(STYLE):
        figure = _figure(3.6 * columns, 2.5 * rows + (0.3 if title else 0))
        for i, draw in enumerate(panels):
            axes = figure.add_subplot(rows, columns, i + 1)
            draw(axes)
            axes.set_xlim(0, end)
            if i >= len(panels) - columns:
                axes.set_xlabel({"seconds": "training time (s)", "step": "update"}.get(x, x))
        if title:
            figure.suptitle(title, fontsize=10.5)
        return _save(figure, path)


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
        figure = _figure(cell * columns + 0.7, cell * ratio * len(rows) + 0.35)
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for (image, attention), line in zip(rows, grid, strict=True):
            _draw_attention(figure, line, image, attention)
        for axes, name in zip(grid[0], names, strict=True):
            axes.set_title(name, loc="center", fontsize=8.5 if cell > 1.1 else 7.5)
        for line, name in zip(grid, titles or (), strict=bool(titles)):
            line[0].set_ylabel(name)
        return _save(figure, path)


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
        figure = _figure(max(3.6, cell * columns), 2 * cell * min(ratio, 3) * bands + 0.4)
        grid = figure.subplots(2 * bands, columns, squeeze=False)
        for axes in grid.flat:
            _bare(axes)
        for number, (image, colors) in enumerate(images):
            band, column = divmod(number, PER_BAND)
            height, width = image.shape[:2]
            grid[2 * band, column].imshow(image)
            grid[2 * band + 1, column].imshow(colors, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
        named = [f"{name} {share:.0%}" for name, share in zip(("red", "green", "blue"), shares, strict=False)]
        figure.suptitle(f"principal components of the patch tokens\n(share of variance: {', '.join(named)})",
                        fontsize=9.5)
        return _save(figure, path)


def plot_matches(view_a: Pixels, view_b: Pixels, ids_a: Sequence[int] | np.ndarray,
                 ids_b: Sequence[int] | np.ndarray, patch_size: int, path: Path | str, *,
                 overlap: Overlap | None = None, lines: int = 0,
                 names: tuple[str, str] = ("teacher view", "student view")) -> Path:
    """Which patches of two views show the same place: same color and, up to 60 places, same number.

    `view_a` (S, S, 3) and `view_b` (s, s, 3) uint8; `ids_a[i]` and `ids_b[i]` are the patches of match i,
    row-major. A color says where in `view_a` a patch lies; patches without a match are dimmed. `overlap` adds
    a panel with the source image and both crops, `lines` draws so many lines between partners.
    """
    first, second = np.asarray(ids_a, dtype=np.int64), np.asarray(ids_b, dtype=np.int64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"ids of matched patches come in pairs, there are {first.shape} and {second.shape}")
    sides = [patches_per_side(view.shape[0], patch_size) for view in (view_a, view_b)]
    panels = 3 if overlap else 2
    numbers = {int(patch): number for number, patch in enumerate(np.unique(first), 1)}
    numbered, palette = len(numbers) <= MAX_NUMBERED, _place_colors(first, sides[0])
    with matplotlib.rc_context(STYLE):
        figure = _figure(3.2 * panels, 3.8)
        axes = list(figure.subplots(1, panels, width_ratios=[1.25, 1, 1] if overlap else None))
        if overlap:
            _draw_crops(axes.pop(0), overlap, names)
        for area, view, side, own in zip(axes, (view_a, view_b), sides, (first, second), strict=True):
            labels = {int(i): numbers[int(a)] for i, a in zip(own, first, strict=True)}
            colors = {int(i): palette[int(a)] for i, a in zip(own, first, strict=True)}
            _draw_patches(area, view, side, colors, labels if numbered else {})
        for i in np.unique(np.linspace(0, len(first) - 1, min(lines, len(first))).astype(int)):
            ends = _middle(int(first[i]), sides[0]), _middle(int(second[i]), sides[1])
            figure.add_artist(ConnectionPatch(ends[0], ends[1], "data", "data", axesA=axes[0], axesB=axes[1],
                                              linewidth=0.9, color=palette[int(first[i])]))
        for area, view, name, side in zip(axes, (view_a, view_b), names, sides, strict=True):
            area.set_title(f"{name}, {view.shape[1]} px, {side} x {side} patches", loc="center")
        figure.suptitle(f"{len(second)} of {sides[1] ** 2} patches of the {names[1]} matched, with "
                        f"{len(numbers)} of {sides[0] ** 2} of the {names[0]}", fontsize=10.5)
        return _save(figure, path)


def plot_views(sheets: Sequence[Sheet], path: Path | str, *, title: str = "") -> Path:
    """A sheet of views, one row per image, each view with its caption; rows may differ in length."""
    columns = max(len(sheet.images) for sheet in sheets)
    cell = min(1.45, 12 / columns)
    with matplotlib.rc_context(STYLE):
        figure = _figure(cell * columns, (cell + 0.22) * len(sheets) + (0.3 if title else 0))
        grid = figure.subplots(len(sheets), columns, squeeze=False)
        for sheet, line in zip(sheets, grid, strict=True):
            for axes in line:
                axes.set_axis_off()
            for axes, image, caption in zip(line, sheet.images, sheet.captions, strict=False):
                axes.imshow(image)
                axes.set_title(caption, loc="center", fontsize=7.5 if cell > 1.2 else 6.5, pad=3)
        if title:
            figure.suptitle(title, fontsize=10.5)
        return _save(figure, path)


def _draw_loss(axes: Axes, log: LogRows, x: str) -> None:
    split = _has(log, "patch_loss") and any(row.get("patch_loss") for row in log)
    names = [("loss", "total", BLUE)]
    if split:
        names += [("class_loss", "class tokens", ORANGE), ("patch_loss", "matched patches", GREEN)]
    for key, label, color in names:
        _curve(axes, log, x, key, label, color)
    axes.set(title="Loss", ylabel="cross-entropy (nats)")
    if split:
        axes.legend()


def _draw_knn(axes: Axes, log: LogRows, x: str, references: Mapping[str, float],
              others: Mapping[str, LogRows]) -> None:
    _curve(axes, log, x, "knn_top1", "this run", BLUE, scale=100, marker="o")
    for (name, rows), color in zip(others.items(), (ORANGE, PURPLE, SKY), strict=False):
        _curve(axes, rows, x, "knn_top1", name, color, scale=100, marker="s")
    styles = (("--", RED), (":", GRAY), ("-.", GREEN))
    for (name, share), (style, color) in zip(references.items(), styles, strict=False):
        axes.axhline(100 * share, color=color, linestyle=style, linewidth=1.2, label=name)
    axes.set(title="k-NN during training", ylabel="top-1 accuracy (%)")
    axes.legend()


def _draw_entropy(axes: Axes, log: LogRows, x: str, num_prototypes: int | None) -> None:
    _curve(axes, log, x, "teacher_entropy", "class tokens", BLUE)
    if any(row.get("patch_entropy") for row in log):
        _curve(axes, log, x, "patch_entropy", "patch tokens", GREEN)
    if _has(log, "marginal_entropy"):
        _curve(axes, log, x, "marginal_entropy", "mean over images", PURPLE)
    if num_prototypes:
        top = math.log(num_prototypes)
        axes.axhline(top, color=GRAY, linestyle="--", linewidth=1.1)
        axes.annotate(f"uniform: ln K = {top:.2f}", (0.01, top), xycoords=("axes fraction", "data"),
                      xytext=(0, -2), textcoords="offset points", va="top", fontsize=8, color=GRAY)
    axes.set(title="Entropy of the teacher's targets", ylabel="entropy (nats)")
    axes.set_ylim(bottom=0)
    if len(axes.get_lines()) > 1:
        axes.legend()


def _draw_rank(axes: Axes, log: LogRows, x: str) -> None:
    _curve(axes, log, x, "effective_rank", "", BLUE)
    axes.set(title="Effective rank of the class tokens", ylabel="effective rank")
    axes.set_ylim(bottom=0)


def _curve(axes: Axes, log: LogRows, x: str, key: str, label: str, color: str, *, scale: float = 1.0,
           marker: str = "") -> None:
    """One line over the rows that have `key`; more than 200 points are pale, below their running mean."""
    found = [(row[x], scale * row[key]) for row in log if x in row and row.get(key) is not None]
    points = np.array(found, dtype=float)
    if not len(points):
        return
    if len(points) > 200:
        axes.plot(*points.T, color=color, alpha=0.25, linewidth=0.8)
        window = len(points) // 50
        smooth = np.convolve(points[:, 1], np.full(window, 1 / window), mode="valid")
        points = np.stack([points[window - 1 :, 0], smooth], axis=1)
    dot = marker or ("o" if len(points) == 1 else "")  # a line through one point is invisible
    axes.plot(*points.T, color=color, label=label or None, marker=dot, markersize=3.5)


def _has(log: LogRows, key: str) -> bool:
    return any(row.get(key) is not None for row in log)


def _draw_attention(figure: Figure, line: Sequence[Axes], image: Pixels, attention: np.ndarray) -> None:
    height, width = image.shape[:2]
    relative = attention * (attention.shape[1] * attention.shape[2])
    maps = [relative.mean(0), *relative]
    low, high = np.percentile(np.stack(maps), [0.5, 99.5])
    spare = max(0.0, MIN_SPAN - (high - low)) / 2
    low, high = max(0.0, low - spare), high + spare
    for axes in line:
        _bare(axes)
    line[0].imshow(image)
    shown = [axes.imshow(values, cmap="viridis", vmin=low, vmax=high, extent=(0, width, height, 0))
             for axes, values in zip(line[1:], maps, strict=True)]
    bar = figure.colorbar(shown[0], ax=list(line), fraction=0.02, pad=0.01, aspect=12, extend="both")
    bar.set_label("× uniform", fontsize=7)
    bar.ax.tick_params(labelsize=7)


def _place_colors(patches: np.ndarray, side: int) -> dict[int, np.ndarray]:
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
    _bare(axes)


def _middle(patch: int, side: int) -> tuple[float, float]:
    """Center (x, y) of a patch in units of patches."""
    row, column = divmod(patch, side)
    return column + 0.5, row + 0.5


def _draw_crops(axes: Axes, overlap: Overlap, names: Sequence[str]) -> None:
    axes.imshow(overlap.image)
    views, styles = (overlap.view_a, overlap.view_b), ((BLUE, "-"), (ORANGE, "--"))
    for view, name, (color, style) in zip(views, names, styles, strict=True):
        label = f"{name}{' (mirrored)' if view.mirrored else ''}"
        corner = (view.left - 0.5, view.top - 0.5)  # imshow puts pixel centers at whole numbers
        axes.add_patch(Rectangle(corner, view.width, view.height, fill=False, edgecolor=color,
                                 linestyle=style, linewidth=2.2, label=label))
    _bare(axes)
    axes.set_title("source image and crops", loc="center")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=2)


def _bare(axes: Axes) -> None:
    """Nothing but the picture: no ticks, grid or frame."""
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _figure(width: float, height: float) -> Figure:
    """A figure of `width` x `height` inches that belongs to nobody else."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path | str) -> Path:
    """Write the figure, without the date that would make the same figure differ."""
    path = Path(path)
    known = figure.canvas.get_supported_filetypes()
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in known:
        raise UsageError(f"{path.name} asks for a figure of type '{suffix}'; "
                         f"choose one of: {', '.join(sorted(known))}")
    path.parent.mkdir(parents=True, exist_ok=True)
    dates: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    figure.savefig(path, format=suffix, metadata=dates.get(suffix))
    return path
