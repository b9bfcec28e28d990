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

from patchssl.backbone import Backbone, whole_patches
from patchssl.data import open_images
from patchssl.errors import DataError, UsageError
from patchssl.eval.results import read_results
from patchssl.geometry import View
from patchssl.imagefile import decode_image
from patchssl.loading import load_backbone
from patchssl.matching import match_patches
from patchssl.pretrain.config import Recipe, load_recipe, parse_recipe
from patchssl.pretrain.photometric import apply_colors, draw_sample_colors
from patchssl.pretrain.views import cut_views, sample_rng
from patchssl.pretrain.views import draw_views as draw_geometry
from patchssl.report.robustness import robustness_curves

Pixels = np.ndarray  # (H, W, 3) uint8
MOST_PATCHES = 16_384  # of one image: 1024 x 1024 pixels at patch 8


def read_image(name: str) -> Pixels:
    """The image file `name`, or image INDEX of the training images of SET where `name` is SET:INDEX."""
    data, colon, index = name.rpartition(":")
    if Path(name).is_file() or not (colon and index.isdecimal()):
        if not Path(name).is_file():
            raise DataError(f"{name} is neither an image file nor SET:INDEX, as in textures:7")
        return decode_image(Path(name))
    images = open_images(data)
    if int(index) >= len(images):
        raise DataError(f"{name}: {images.name} has {len(images)} images, the last is {data}:{len(images) - 1}")
    return images.pixels(int(index))


def recipe_of(name: str, model: str | None = None, rule: str | None = None) -> Recipe:
    """The recipe `name`: shipped, a YAML file or a run folder.

    With `model` the patch and view size are that backbone's, with `rule` matching follows that rule.
    """
    run = Path(name) / "recipe.yaml"
    overrides = (f"loss.rule={rule}",) if rule else ()
    recipe = parse_recipe(run.read_text(), overrides, str(run)) if run.is_file() else load_recipe(name, overrides)
    if model is None:
        return recipe
    backbone = load_backbone(model)
    patch, size = backbone.patch_size, backbone.image_size
    local = max(patch, round(size * 3 / 7 / patch) * patch)  # 96 of 224, in whole patches
    views = recipe.views.model_copy(update={"global_size": size, "local_size": local})
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"patch_size": patch}), "views": views})


def check_size(pixels: Pixels, patch_size: int, size: int) -> None:
    """Errors where an image resized to the short side `size` holds no patch, or more than a network can look at."""
    height, width = pixels.shape[:2]
    if size < patch_size:
        raise UsageError(f"--size {size} is less than the model's patch size of {patch_size} pixels")
    patches = size // patch_size * int(size * max(height, width) / min(height, width) / patch_size)
    if patches > MOST_PATCHES:
        raise DataError(f"an image of {height} x {width} pixels with its short side at {size} would be {patches:,} "
                        f"patches, more than {MOST_PATCHES:,}; crop it, or choose a smaller --size")


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
        check_size(pixels, backbone.patch_size, size)
        x = normalized(pixels, backbone, size)
        height, width = (side // backbone.patch_size for side in x.shape[-2:])
        x = x[..., : height * backbone.patch_size, : width * backbone.patch_size]
        attention = backbone.class_attention(x.to(backbone.device))[0].float().cpu()
        rows.append((_pixels_of(x, backbone), attention.unflatten(-1, (height, width)).numpy()))
    return rows


@torch.inference_mode()
def token_maps(backbone: Backbone, images: Sequence[Pixels], size: int) -> list[tuple[Pixels, np.ndarray]]:
    """For each image what the network saw of it (H, W, 3), and its patch tokens (rows, columns, D) float32."""
    maps = []
    for pixels in images:
        check_size(pixels, backbone.patch_size, size)
        x = whole_patches(normalized(pixels, backbone, size), backbone.patch_size)
        height, width = (side // backbone.patch_size for side in x.shape[-2:])
        tokens = backbone.patch_tokens(x.to(backbone.device))[0].float().cpu()
        if len(tokens) != height * width:
            raise UsageError(f"{backbone.name} gave {len(tokens)} patch tokens for {height} x {width} patches")
        maps.append((_pixels_of(x, backbone), tokens.unflatten(0, (height, width)).numpy()))
    return maps


def component_colors(maps: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """Colors (rows, columns, 3) in [0, 1] of token maps (rows, columns, D), and the shares of variance they show.

    Red, green and blue are the first three principal components of the tokens of all maps together, each stretched
    from its 1st to its 99th percentile: one color means one thing in all of them. Fewer components than three: the
    colors of those that lack stay in the middle. UsageError for tokens that do not differ, or are not finite.
    """
    from sklearn.decomposition import PCA

    tokens = np.concatenate([one.reshape(-1, one.shape[-1]) for one in maps]).astype(np.float64)
    if not np.isfinite(tokens).all() or np.allclose(tokens, tokens[0]):
        raise UsageError(f"{len(tokens)} patch tokens that are all the same, or not finite, have no components to draw")
    pca = PCA(min(3, *tokens.shape), svd_solver="full").fit(tokens)
    places = pca.transform(tokens)
    low, high = np.percentile(places, (1, 99), axis=0)
    stretched = ((places - low) / np.maximum(high - low, np.finfo(float).tiny)).clip(0, 1)
    colors = np.full((len(tokens), 3), 0.5)
    colors[:, : stretched.shape[1]] = stretched
    ends = np.cumsum([one.shape[0] * one.shape[1] for one in maps])[:-1]
    parts = zip(np.split(colors, ends), maps, strict=True)
    return [part.reshape(*one.shape[:2], 3) for part, one in parts], pca.explained_variance_ratio_


def _pixels_of(x: Tensor, backbone: Backbone) -> Pixels:
    """The pixels of normalized images (1, 3, H, W)."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (backbone.mean, backbone.std))
    return ((x[0] * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def views_of(pixels: Pixels, recipe: Recipe, seed: int, index: int = 0) -> tuple[list[View], list[Pixels]]:
    """The views that training draws from an image, geometry and colored pixels, globals first."""
    height, width = pixels.shape[:2]
    geometry = draw_geometry(sample_rng(seed, 0, index, "crops"), height, width, recipe.views)
    num_global, patch = recipe.views.num_global, recipe.model.patch_size
    patches = [(size // patch) ** 2 for size in (recipe.views.global_size, recipe.views.local_size)]
    draws = draw_sample_colors(sample_rng(seed, 0, index, "color"), recipe.photometric, num_global,
                               recipe.views.num_local, *patches)
    colored: list[Pixels] = []
    for views, colors in zip((geometry[:num_global], geometry[num_global:]), draws, strict=True):
        if views:
            cut = apply_colors(cut_views(pixels, views), colors, patch)
            colored += [(view * 255).round().byte().permute(1, 2, 0).numpy() for view in cut]
    return geometry, colored


def draw_attention(model: str | Backbone, images: Sequence[str], out: Path, *, size: int | None = None,
                   device: torch.device | str = "cpu") -> Path:
    """Write the class attention of `model` on `images` (files or SET:INDEX); `size`: short side in pixels."""
    from patchssl.report.plots import plot_attention

    backbone = load_backbone(model, device) if isinstance(model, str) else model
    rows = attention_rows(backbone, [read_image(name) for name in images], size or backbone.image_size)
    return plot_attention(rows, out)


def draw_pca(model: str | Backbone, images: Sequence[str], out: Path, *, size: int | None = None,
             device: torch.device | str = "cpu") -> Path:
    """Write the patch tokens of `model` on `images` (files or SET:INDEX) as colors; `size`: short side in pixels."""
    from patchssl.report.plots import plot_components

    backbone = load_backbone(model, device) if isinstance(model, str) else model
    maps = token_maps(backbone, [read_image(name) for name in images], size or backbone.image_size)
    colors, shares = component_colors([tokens for _, tokens in maps])
    return plot_components([(seen, found) for (seen, _), found in zip(maps, colors, strict=True)], out, shares=shares)


def draw_matches(image: str, recipe: Recipe, out: Path, *, seed: int = 0) -> Path:
    """Write two colored views of `image`, a global and (where the recipe has one) a local one, with their matches.

    Of the views that training would draw in its first epochs, the first pair is taken that shares a patch.
    """
    from patchssl.report.plots import Overlap, plot_matches

    pixels = read_image(image)
    patch, student = recipe.model.patch_size, min(recipe.views.num_global, recipe.views.num_views - 1)
    for index in range(100):
        geometry, colored = views_of(pixels, recipe, seed, index)
        pair = geometry[0], geometry[student]
        teacher_ids, student_ids = match_patches(*pair, patch, recipe.loss.rule)
        if len(student_ids):
            return plot_matches(colored[0], colored[student], teacher_ids.numpy(), student_ids.numpy(), patch, out,
                                overlap=Overlap(pixels, *pair))
    raise DataError(f"no two views of {image} that share a patch came up in 100 draws; try another --seed")


def draw_views(images: Sequence[str], recipe: Recipe, out: Path, *, seed: int = 0) -> Path:
    """Write a sheet of the colored views of `images` that training draws, one row per image, the original first."""
    from patchssl.report.plots import Sheet, plot_views

    num_global = recipe.views.num_global
    sheets = []
    for index, name in enumerate(images):
        pixels = read_image(name)
        _, colored = views_of(pixels, recipe, seed, index)
        captions = ["image", *(f"global {i + 1}" for i in range(num_global)),
                    *(f"local {i + 1}" for i in range(len(colored) - num_global))]
        sheets.append(Sheet([pixels, *colored], captions))
    return plot_views(sheets, out)


def draw_curves(run: Path, out: Path, references: dict[str, float] | None = None) -> Path:
    """Write loss, k-NN, entropy and rank of the run folder `run`; `references` are k-NN accuracies to compare with."""
    from patchssl.report.plots import plot_curves

    log = run / "log.jsonl"
    if not log.is_file():
        raise UsageError(f"{run} is not a run folder that has logged yet: it has no log.jsonl")
    rows: list[dict[str, Any]] = [json.loads(line) for line in log.read_text().splitlines() if line]
    num_prototypes = recipe_of(str(run)).head.num_prototypes
    return plot_curves(rows, out, references=references, num_prototypes=num_prototypes)


def draw_robustness(results: Path, out: Path, *, dataset: str | None = None,
                    protocol: str | None = None) -> tuple[Path, list[str]]:
    """Write mAP against JPEG quality and share cut away from the Copydays records below `results`.

    With `dataset` and `protocol` only of those. Also returns a sentence for every record that had to be left out.
    """
    from patchssl.report.plots import plot_robustness

    records, problems = read_results(results)
    settings = robustness_curves(records)
    if not settings:
        raise DataError(f"{results} holds no records of Copydays or a set in its layout; make one with: patchssl eval "
                        f"copydays MODEL --data DIR --results {results}")
    chosen = [setting for setting in settings if dataset in (None, setting.dataset)
              and protocol in (None, setting.protocol)]
    if not chosen:
        known = "; ".join(f"{setting.dataset} ({setting.protocol})" for setting in settings)
        raise UsageError(f"no record below {results} is of the set {dataset or 'any'} under the protocol "
                         f"{protocol or 'any'}; there are: {known}")
    return plot_robustness(chosen, out), problems
