"""From a model, a recipe and an image to a figure: what the `plot` commands and the quickstart draw."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from patchssl.backbone import Backbone, load_backbone
from patchssl.data import open_images
from patchssl.errors import DataError, UsageError
from patchssl.geometry import View
from patchssl.imagefile import decode_image
from patchssl.matching import match_patches
from patchssl.pretrain.config import Recipe, load_recipe, parse_recipe
from patchssl.pretrain.photometric import apply_colors, draw_sample_colors, stack_draws
from patchssl.pretrain.views import cut_views, draw_views, sample_rng

Pixels = np.ndarray  # (H, W, 3) uint8


def read_image(name: str) -> Pixels:
    """The image file `name`, or image INDEX of the training images of SET where `name` is SET:INDEX."""
    data, colon, index = name.rpartition(":")
    if Path(name).is_file() or not (colon and index.isdecimal()):
        if not Path(name).is_file():
            raise DataError(f"{name} is neither an image file nor SET:INDEX, as in textures:7")
        return decode_image(Path(name))
    images = open_images(data, "train")
    if int(index) >= len(images):
        raise DataError(f"{name}: {images.name} has {len(images)} images, the last is {data}:{len(images) - 1}")
    return images.pixels(int(index))


def recipe_of(name: str, backbone: Backbone | None = None) -> Recipe:
    """The recipe `name` (shipped, a YAML file or a run folder), with a backbone's patch and view size if given."""
    run = Path(name) / "recipe.yaml"
    recipe = parse_recipe(run.read_text(), where=str(run)) if run.is_file() else load_recipe(name)
    if backbone is None:
        return recipe
    patch, size = backbone.patch_size, backbone.image_size
    local = max(patch, round(size * 3 / 7 / patch) * patch)  # 96 of 224, in whole patches
    views = recipe.views.model_copy(update={"global_size": size, "local_size": local})
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"patch_size": patch}), "views": views})


def normalized(pixels: Pixels, backbone: Backbone, size: int) -> Tensor:
    """(1, 3, H, W) normalized for `backbone`: short side resized to `size`, the rest cut to whole patches."""
    image = TF.resize(torch.from_numpy(pixels).permute(2, 0, 1), [size], antialias=True,
                      interpolation=TF.InterpolationMode.BICUBIC)
    return TF.normalize(TF.to_dtype(image, scale=True), list(backbone.mean), list(backbone.std))[None]


@torch.inference_mode()
def attention_rows(backbone: Backbone, images: Sequence[Pixels], size: int) -> list[tuple[Pixels, np.ndarray]]:
    """For each image what the network saw of it (H, W, 3), and its class attention (heads, rows, columns)."""
    rows = []
    for pixels in images:
        x = normalized(pixels, backbone, size)
        height, width = (side // backbone.patch_size for side in x.shape[-2:])
        x = x[..., : height * backbone.patch_size, : width * backbone.patch_size]
        attention = backbone.class_attention(x.to(backbone.device))[0].float().cpu()
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (backbone.mean, backbone.std))
        seen = ((x[0] * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        rows.append((seen, attention.unflatten(-1, (height, width)).numpy()))
    return rows


def views_of(pixels: Pixels, recipe: Recipe, seed: int, index: int = 0) -> tuple[list[View], list[Pixels]]:
    """The views that training draws from an image, geometry and colored pixels, globals first."""
    geometry = draw_views(sample_rng(seed, 0, index, "crops"), *pixels.shape[:2], recipe.views)
    num_global, patch = recipe.views.num_global, recipe.model.patch_size
    patches = [(size // patch) ** 2 for size in (recipe.views.global_size, recipe.views.local_size)]
    draws = draw_sample_colors(sample_rng(seed, 0, index, "color"), recipe.photometric, num_global,
                               recipe.views.num_local, *patches)
    colored: list[Pixels] = []
    for views, colors in zip((geometry[:num_global], geometry[num_global:]), draws, strict=True):
        if views:
            cut = apply_colors(cut_views(pixels, views), stack_draws([colors]).flatten(), patch)
            colored += [(view * 255).round().byte().permute(1, 2, 0).numpy() for view in cut]
    return geometry, colored
