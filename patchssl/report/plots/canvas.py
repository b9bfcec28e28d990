"""What all figures share: style, colors that color-blind readers tell apart, and writing the file.

Colors of lines are Okabe and Ito's. The suffix chooses the format (.png, .svg, .pdf and what else matplotlib knows).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from patchssl.eval.records import plain_text
from patchssl.runtime.errors import DataError, UsageError
from patchssl.runtime.files import whole_file

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GRAY = "#CC79A7", "#56B4E9", "#6B6B6B"
LINES = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GRAY)  # of curves in one figure, in this order
STYLE = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9,
    "axes.titlesize": 9.5, "axes.labelsize": 9, "legend.fontsize": 8,
    "xtick.labelsize": 8, "ytick.labelsize": 8,
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.6, "lines.linewidth": 1.6,
    "legend.framealpha": 0.85, "legend.edgecolor": "none", "image.interpolation": "nearest",
    "savefig.dpi": 200, "savefig.bbox": "tight", "savefig.pad_inches": 0.05, "svg.hashsalt": "patchssl",
    "pdf.fonttype": 42,  # letters that journals can search and print
    "text.parse_math": False,  # a model may be named a$b$
}
PLACES = 9  # digits of a place in a figure, in shares of its width and height
LONGEST_NAME = 48  # characters of a name in a figure
Pixels = np.ndarray  # (H, W, 3) uint8


def shown_name(name: str, most: int = LONGEST_NAME) -> str:
    """`name` as a figure can show it: one line of at most `most` printable characters that no legend takes for hidden.

    >>> shown_name("_a\\nb"), shown_name("x" * 50)[-3:]
    (' _a b', 'xx…')
    """
    plain = "".join(letter if letter.isprintable() else " " for letter in plain_text(name))
    cut = plain if len(plain) <= most else plain[: most - 1] + "…"
    return f" {cut}" if cut.startswith("_") else cut


def grid_extent(image: Pixels, grid: tuple[int, ...], patch_size: int | None) -> tuple[float, float, float, float]:
    """Left, right, bottom and top in pixels of a grid of (rows, columns) patches that begins where `image` does.

    None: the grid spans the image.
    """
    if patch_size is None:
        return 0, image.shape[1], image.shape[0], 0
    return 0, grid[1] * patch_size, grid[0] * patch_size, 0


def padding_note(image: Pixels, grid: tuple[int, ...], patch_size: int | None) -> str:
    """What a figure says below an image (H, W, 3) that was padded to whole patches, else nothing."""
    _, width, height, _ = grid_extent(image, grid, patch_size)
    if (height, width) == image.shape[:2]:
        return ""
    return f"{image.shape[0]} × {image.shape[1]} px,\npadded to {height} × {width}"


def bare(axes: Axes) -> None:
    """Nothing but the picture: no ticks, grid or frame."""
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)


def new_figure(width: float, height: float) -> Figure:
    """A figure of `width` x `height` inches that belongs to nobody else."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def check_figure_path(path: Path | str) -> Path:
    """`path`, before hours of work: UsageError for a suffix that is no format, DataError where no file can be."""
    path = Path(path)
    known = FigureCanvasAgg.get_supported_filetypes()
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in known:
        raise UsageError(f"{path.name} asks for a figure of type '{suffix}'; "
                         f"choose one of: {', '.join(sorted(known))}")
    if path.is_dir():
        raise DataError(f"{path} is a folder; name a file for the figure")
    return path


def save(figure: Figure, path: Path | str) -> Path:
    """Write the figure, without the date that would make the same figure differ; at every moment the file is whole."""
    path = check_figure_path(path)
    suffix = path.suffix.lower().removeprefix(".")
    dates: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    _lay_out(figure)
    with whole_file(path, "figure") as partial:
        figure.savefig(partial, format=suffix, metadata=dates.get(suffix))
    return path


def _lay_out(figure: Figure) -> None:
    """Lay the figure out for good, at the resolution it is saved in.

    Places are rounded: in their last bits they depend on where the layout's solver has its variables in memory, which
    can move a line that lies between two pixels.
    """
    figure.set_dpi(matplotlib.rcParams["savefig.dpi"])
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for part in figure.subfigs:
        part.bbox_relative.set_points(np.round(part.bbox_relative.get_points(), PLACES))
    for axes in figure.axes:  # those of its parts are among them
        axes.set_position(tuple(np.round(axes.get_position(original=True).bounds, PLACES)))
