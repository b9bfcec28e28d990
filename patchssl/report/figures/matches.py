"""The figure of matches that networks find by their tokens, between two views of an image or between two images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from patchssl.eval.patches import with_patches
from patchssl.models.backbone import Backbone
from patchssl.models.load import open_model
from patchssl.report.figures.nearest import RIGHT, match_images, match_views
from patchssl.report.figures.tokens import Pixels, Say, item_name, read_image, token_maps
from patchssl.report.plots import MatchedPair, Overlap, check_figure_path, plot_token_matches
from patchssl.report.plots.canvas import shown_name


def draw_view_matches(models: Sequence[str | Backbone], image: str, out: Path, *, seed: int = 0,
                      color: str | None = None, lines: int = 30, device: torch.device, say: Say) -> Path:
    """Write what each of `models` matches between a wide and a close view of `image` (a file or SET:INDEX).

    The views are those that `eval patches` cuts of this image with this `seed`, and so are the shares of patches that
    find the right one; crops are the same for all models, each sees them at its own size.
    """
    check_figure_path(out)
    pixels, name = read_image(image), item_name(image)
    pairs = []
    for model in models:
        backbone = model if isinstance(model, Backbone) else with_patches(open_model(model, device, say))
        found = match_views(backbone, pixels, name, seed=seed)
        size = found.views[0].size // backbone.patch_size
        drawn = min(lines, len(found.matches.first))
        title = (f"{_named(model)}\n{_percent(found.exact)} of {found.num_patches} patches find the right one, "
                 f"{_percent(found.within1)} it or a neighbor;\nof the {drawn} best of {len(found.matches.first)} "
                 f"mutual matches {int((found.verdicts[:drawn] == RIGHT).sum())} are right")
        pairs.append(MatchedPair(title, found.pixels, ((size, size), (size, size)), backbone.patch_size,
                                 found.matches[:2], found.matches.similarity, found.verdicts))
        source = Overlap(pixels, *found.views)
    return plot_token_matches(pairs, out, names=("wide view", "close view"), color=color, lines=lines, source=source)


def draw_image_matches(models: Sequence[str], images: tuple[str, str], out: Path, *, size: int | None = None,
                       color: str | None = None, lines: int = 30, device: torch.device, say: Say) -> Path:
    """Write what each of `models` matches between two images (files or SET:INDEX) at the short side `size`."""
    check_figure_path(out)
    pixels = [read_image(name) for name in images]
    pairs = [_match(with_patches(open_model(model, device, say)), model, pixels, images, size, lines, say)
             for model in models]
    return plot_token_matches(pairs, out, names=("first image", "second image"), color=color, lines=lines)


def _match(backbone: Backbone, model: str, pixels: Sequence[Pixels], names: Sequence[str], size: int | None,
           lines: int, say: Say) -> MatchedPair:
    (first, tokens), (second, others) = token_maps(backbone, pixels, size or backbone.image_size, say=say, names=names)
    matches = match_images(tokens, others)
    grids = (tokens.shape[0], tokens.shape[1]), (others.shape[0], others.shape[1])
    title = (f"{_named(model)}\nthe {min(lines, len(matches.first))} best of {len(matches.first)} mutual matches, "
             f"of {np.prod(grids[0])} and {np.prod(grids[1])} patches")
    return MatchedPair(title, (first, second), grids, backbone.patch_size, matches[:2], matches.similarity)


def _named(model: str | Backbone) -> str:
    return shown_name(model if isinstance(model, str) else model.name, most=80)


def _percent(share: float) -> str:
    return "–" if np.isnan(share) else f"{share:.0%}"
