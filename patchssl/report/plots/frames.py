"""A frame of an attention video: the image, attention over it, and the patches that hold most of it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from PIL import Image

from patchssl.report.plots.attention import COLORS, DIMMED, largest_mass
from patchssl.report.plots.canvas import STYLE, Pixels, shown_name
from patchssl.report.plots.library import figure_style

SCALE = 1 / 4, 16.0  # of all videos, in units of uniform attention, logarithmic: frames and networks can be compared
DPI = 100
LONG_SIDE = 320  # of a panel, in pixels
TOP, GAP, BOTTOM = 46, 10, 56  # pixels


class FrameSheet(NamedTuple):
    """What stands still in a video, (H, W, 3) uint8 of even size, and where the three panels go."""

    canvas: Pixels
    panels: tuple[tuple[int, int], ...]  # top left corners (row, column)
    size: tuple[int, int]  # rows and columns of a panel


def make_sheet(image_shape: tuple[int, ...], title: str, mass: float) -> FrameSheet:
    """Titles and the color scale around panels for frames of (height, width, ...)."""
    scale = LONG_SIDE / max(image_shape[:2])
    height, width = (max(1, round(side * scale)) for side in image_shape[:2])
    # titles need room beside each other, and video encoders even sizes
    step = max(width, 240) + GAP
    rows, columns = (-(-length // 2) * 2 for length in (TOP + height + BOTTOM, 3 * step + GAP))
    lefts = [GAP + at * step + (step - GAP - width) // 2 for at in range(3)]
    with figure_style(STYLE):
        figure = Figure(figsize=(columns / DPI, rows / DPI), dpi=DPI, facecolor="white")
        canvas = FigureCanvasAgg(figure)
        figure.text(GAP / columns, 1 - 6 / rows, title and shown_name(title, most=100), va="top")
        for left, name in zip(lefts, ("image", "attention, mean of heads", f"{mass:.0%} of its mass"), strict=True):
            figure.text((left + width / 2) / columns, 1 - (TOP - 5) / rows, name, ha="center", va="bottom")
        below = 1 - (TOP + height + 18) / rows
        bar = figure.colorbar(ScalarMappable(LogNorm(*SCALE), COLORS), orientation="horizontal", extend="both",
                              cax=figure.add_axes((lefts[1] / columns, below, width / columns, 10 / rows)))
        bar.set_ticks([1 / 4, 1, 4, 16], labels=["1/4", "1", "4", "16"])
        bar.minorticks_off()
        bar.ax.tick_params(labelsize=7.5, pad=1)
        bar.ax.set_xlabel("× uniform attention", fontsize=7.5, labelpad=1)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return FrameSheet(pixels, tuple((TOP, left) for left in lefts), (height, width))


def draw_frame(sheet: FrameSheet, image: Pixels, attention: np.ndarray, patch_size: int, mass: float) -> Pixels:
    """The frame for an image (H, W, 3) uint8 and its class attention (heads, rows, columns), padded at its end."""
    height, width = sheet.size
    mean = attention.mean(0)
    shown = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    # which patch every pixel of the panel lies in
    rows, columns = (((np.arange(count) + 0.5) * side / count // patch_size).astype(int)
                     for count, side in zip((height, width), image.shape[:2], strict=True))
    colors = colormaps[COLORS](LogNorm(*SCALE, clip=True)(mean * mean.size))[..., :3] * 255
    gray = shown.mean(-1, keepdims=True)  # so that every color comes from the scale
    heat = 0.35 * gray + 0.65 * colors[np.ix_(rows, columns)]
    dimmed = np.array(DIMMED)
    veil = shown * (1 - dimmed[3]) + 255 * dimmed[:3] * dimmed[3]
    held = np.where(largest_mass(mean, mass)[np.ix_(rows, columns)][..., None], shown, veil)
    frame = sheet.canvas.copy()
    for (top, left), panel in zip(sheet.panels, (shown, heat, held), strict=True):
        frame[top : top + height, left : left + width] = panel.round().astype(np.uint8)
    return frame
