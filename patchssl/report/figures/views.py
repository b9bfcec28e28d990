"""The views of an image as training draws and colors them, under the three ways to color patches, and sheets of them.

What a view gets patch by patch is read off its pixels: it is what differs from the same view of the same draws under
`patchwise = none`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from patchssl.data.images import ArrayImages
from patchssl.models.backbone import IMAGENET_MEAN, IMAGENET_STD
from patchssl.pretrain.config import Recipe
from patchssl.pretrain.dataset import ViewDataset, collate_views
from patchssl.pretrain.engine import color_views
from patchssl.report.figures.tokens import Pixels
from patchssl.runtime.errors import UsageError, unknown_choice
from patchssl.views.geometry import View

if TYPE_CHECKING:
    from patchssl.report.plots import Sheet

PATCHWISE = {"none": "the whole view", "layered": "the whole view, then each patch",
             "replace": "each patch instead of the whole view"}  # what draws a color under each `photometric.patchwise`
ALL = "all"  # asks for the three beside each other
COMPARED_LOCALS = 3  # local views in a comparison: few, so that their patches are large enough to see
ROUNDING = 1  # of 255 levels: views that differ by more got another color
FACTOR = 2  # by which the comparison amplifies what `layered` adds


class DrawnViews(NamedTuple):
    """The V views of one image, globals first."""

    geometry: list[View]
    crops: list[Pixels]  # before color
    colored: list[Pixels]


def views_of(pixels: Pixels, recipe: Recipe, seed: int, index: int = 0, batch: int = 0) -> DrawnViews:
    """What training under `recipe` sees of the image `pixels` in its first epoch, if that is image `index` of a set.

    Where the images of a batch share their draws, `batch` is its batch, and the geometry is that of the common square.
    """
    images = ArrayImages(name="image", split="all", source="one image", array=pixels[None],
                         ids=np.zeros(index + 1, np.int64))
    drawn = collate_views([ViewDataset(images, recipe, seed)[0, index, batch]])
    crops = [*drawn.global_views[0], *drawn.local_views[0]]
    places = zip(drawn.boxes[0].tolist(), drawn.mirrored[0].tolist(), crops, strict=True)
    geometry = [View(top, left, height, width, mirrored, crop.shape[-1])
                for (top, left, height, width), mirrored, crop in places]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    normalized = [view for views in color_views(drawn, recipe, torch.device("cpu")) for view in views[0]]
    colored = [((view * std + mean) * 255).round().clamp(0, 255).byte() for view in normalized]
    return DrawnViews(geometry, [_as_image(crop) for crop in crops], [_as_image(view) for view in colored])


def _as_image(view: torch.Tensor) -> Pixels:
    """(S, S, 3) uint8 of a view (3, S, S) uint8."""
    return view.permute(1, 2, 0).numpy()


def recolored(recipe: Recipe, patchwise: str) -> Recipe:
    """`recipe` with every view colored as `patchwise` says; UsageError for an unknown word."""
    if patchwise not in PATCHWISE:
        raise UsageError(unknown_choice("patchwise", patchwise, [*PATCHWISE, ALL]))
    photometric = recipe.photometric.model_copy(update={"patchwise": patchwise, "patch_share": 1.0})
    return recipe.model_copy(update={"photometric": photometric})


def color_title(recipe: Recipe) -> str:
    """What a figure says of the color of its views.

    >>> color_title(Recipe())
    'color: layered (the whole view, then each patch) in every view'
    """
    mode, share = recipe.patch_color, recipe.photometric.patch_share
    if mode == "none" or share == 1:
        return f"color: {mode} ({PATCHWISE[mode]}) in every view"
    return f"color: {mode} ({PATCHWISE[mode]}) in {100 * share:g}% of views, marked; the others as a whole"


def view_names(recipe: Recipe) -> list[str]:
    """Names of the views of an image, as captions have them."""
    views = recipe.views
    return [*(f"global {i + 1}" for i in range(views.num_global)), *(f"local {i + 1}" for i in range(views.num_local))]


def sheet_of_views(pixels: Pixels, recipe: Recipe, seed: int, index: int) -> Sheet:
    """The image and its views; those that got patch-wise color say so."""
    from patchssl.report.plots import Sheet

    drawn = views_of(pixels, recipe, seed, index)
    whole = views_of(pixels, recolored(recipe, "none"), seed, index)
    marks = ["\npatch by patch" if np.abs(np.subtract(view, same, dtype=np.int16)).max() > ROUNDING else ""
             for view, same in zip(drawn.colored, whole.colored, strict=True)]
    captions = [name + mark for name, mark in zip(view_names(recipe), marks, strict=True)]
    return Sheet([pixels, *drawn.colored], ["image", *captions])


def amplified(after: Pixels, before: Pixels, factor: float) -> Pixels:
    """`factor` times the difference of two images (H, W, 3) uint8 as a third, in which 128 is no difference.

    What leaves the range of uint8 is cut off.
    """
    return (128 + factor * np.subtract(after, before, dtype=np.float32)).round().clip(0, 255).astype(np.uint8)


def compared_sheets(pixels: Pixels, recipe: Recipe, seed: int, index: int) -> list[Sheet]:
    """The first views of an image before color and under each kind of it, and what `layered` adds to `none`."""
    from patchssl.report.plots import Sheet

    count = recipe.views.num_global + min(recipe.views.num_local, COMPARED_LOCALS)
    drawn = {mode: views_of(pixels, recolored(recipe, mode), seed, index) for mode in PATCHWISE}
    shown = {f"{mode}\n{words}": drawn[mode].colored[:count] for mode, words in PATCHWISE.items()}
    added = [amplified(*pair, FACTOR) for pair in zip(drawn["layered"].colored, drawn["none"].colored, strict=True)]
    none, layered, replace = shown.items()
    difference = f"layered − none\n{FACTOR} times as much, gray where the same", added[:count]
    captions = ["image", *(f"{name},\nbefore color" for name in view_names(recipe)[:count])]
    return [Sheet([pixels, *drawn["none"].crops[:count]], captions),
            *(Sheet([words, *views], [""] * (count + 1)) for words, views in (none, layered, difference, replace))]
