"""From a model, a recipe and an image to a figure: what the `plot` commands and the quickstart draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from patchssl.models.backbone import Backbone
from patchssl.models.load import load_network
from patchssl.pretrain.config import Recipe
from patchssl.pretrain.recipe import load_recipe
from patchssl.pretrain.run.log import LOG
from patchssl.report.figures.tokens import Say, attention_rows, component_colors, read_image, token_maps
from patchssl.report.figures.views import ALL, color_title, compared_sheets, recolored, sheet_of_views, views_of
from patchssl.report.logs import read_run_log
from patchssl.report.tables.robustness import robustness_curves
from patchssl.report.tables.vetting import valid_records
from patchssl.runtime.errors import DataError, UsageError
from patchssl.views.crops import fit_views
from patchssl.views.matching import match_patches


def recipe_of(name: str, model: str | None = None, rule: str | None = None) -> Recipe:
    """The recipe `name`: shipped, a YAML file or a run folder.

    With `model` the patch and view size are that backbone's, with `rule` matching follows that rule.
    """
    run = Path(name) / "recipe.yaml"
    overrides = (f"loss.rule={rule}",) if rule else ()
    recipe = load_recipe(run if run.is_file() else name, overrides)
    if model is None:
        return recipe
    backbone = load_network(model)
    patch, size = backbone.patch_size, backbone.image_size
    local = max(patch, round(size * 3 / 7 / patch) * patch)  # 96 of 224, in whole patches
    views = recipe.views.model_copy(update={"global_size": size, "local_size": local})
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"patch_size": patch}), "views": views})


def draw_attention(model: str | Backbone, images: Sequence[str], out: Path, *, size: int | None = None,
                   mass: float = 0.6, device: torch.device | str = "cpu", say: Say | None = None) -> Path:
    """Write the class attention of `model` on `images` (files or SET:INDEX); `size`: short side in pixels.

    `mass`: the share of the attention whose patches are shown below the maps. `say` hears of images that were padded.
    """
    from patchssl.report.plots import check_figure_path, plot_attention

    check_figure_path(out)
    backbone = _backbone(model, device)
    pixels = [read_image(name) for name in images]
    rows = attention_rows(backbone, pixels, size or backbone.image_size, say=say, names=images)
    return plot_attention(rows, out, patch_size=backbone.patch_size, mass=mass)


def draw_pca(models: str | Backbone | Sequence[str], images: Sequence[str], out: Path, *, size: int | None = None,
             device: torch.device | str = "cpu", say: Say | None = None) -> Path:
    """Write the patch tokens of one or several `models` on `images` (files or SET:INDEX) as colors.

    `size`: short side in pixels, by default what each network was trained at.
    """
    from patchssl.report.plots import check_figure_path, plot_components

    check_figure_path(out)
    pixels, drawn = [read_image(name) for name in images], {}
    for model in [models] if isinstance(models, str | Backbone) else models:
        backbone = _backbone(model, device)
        maps = token_maps(backbone, pixels, size or backbone.image_size, say=say, names=images)
        colors, shares = component_colors([tokens for _, tokens in maps])
        colored = [(seen, found) for (seen, _), found in zip(maps, colors, strict=True)]
        drawn[backbone.name if isinstance(model, Backbone) else model] = colored, shares, backbone.patch_size
    name, (first, shares, patch_size) = next(iter(drawn.items()))
    return plot_components(first, out, shares=shares, patch_size=patch_size, name=name,
                           others={other: drawn[other] for other in drawn if other != name})


def _backbone(model: str | Backbone, device: torch.device | str) -> Backbone:
    return load_network(model, device) if isinstance(model, str) else model


def draw_matches(image: str, recipe: Recipe, out: Path, *, seed: int = 0) -> Path:
    """Write two colored views of `image`, a global and (where the recipe has one) a local one, with their matches.

    Of the views that training would draw in its first epochs, the first pair is taken that shares a patch.
    """
    from patchssl.report.plots import Overlap, plot_matches

    pixels = read_image(image)
    patch, student = recipe.model.patch_size, min(recipe.views.num_global, recipe.views.num_views - 1)
    for index in range(100):
        geometry, _, colored = views_of(pixels, recipe, seed, index, batch=index)
        pair = geometry[0], geometry[student]
        teacher_ids, student_ids = match_patches(*pair, patch, recipe.loss.rule)
        if len(student_ids):
            (first, second), source = fit_views(pair, pixels, recipe.views)
            return plot_matches(colored[0], colored[student], teacher_ids.numpy(), student_ids.numpy(), patch, out,
                                overlap=Overlap(source, first, second))
    raise DataError(f"no two views of {image} that share a patch came up in 100 draws; try another --seed")


def draw_views(images: Sequence[str], recipe: Recipe, out: Path, *, seed: int = 0,
               patchwise: str | None = None) -> Path:
    """Write a sheet of the colored views of `images` that training draws, one row per image, the original first.

    `patchwise`: color every view as with this `photometric.patchwise`, not as `recipe` has it; "all": show the first
    views before color, under each of the three, and what layered adds to none.
    """
    from patchssl.report.plots import check_figure_path, plot_views

    check_figure_path(out)
    if patchwise == ALL:
        sheets = [sheet for index, name in enumerate(images)
                  for sheet in compared_sheets(read_image(name), recipe, seed, index)]
        return plot_views(sheets, out, "color of the same crops under each photometric.patchwise, in every view")
    recipe = recipe if patchwise is None else recolored(recipe, patchwise)
    sheets = [sheet_of_views(read_image(name), recipe, seed, index) for index, name in enumerate(images)]
    return plot_views(sheets, out, color_title(recipe))


def draw_curves(run: Path, out: Path, references: dict[str, float] | None = None,
                others: Sequence[Path] = (), *, say: Say | None = None) -> Path:
    """Write loss, k-NN, entropy and rank of the run folder `run`, and of `others` beside it.

    `references` are k-NN accuracies to compare with. `say` hears of damaged rows, which are skipped.
    """
    from patchssl.report.plots import plot_curves

    rows, num_prototypes = read_log(run, say), recipe_of(str(run)).head.num_prototypes
    if not others:
        return plot_curves(rows, out, references=references, num_prototypes=num_prototypes)
    runs = [run, *others]
    names = [folder.name if [r.name for r in runs].count(folder.name) == 1 else str(folder) for folder in runs]
    if len(set(names)) < len(names):
        raise UsageError(f"{next(name for name in names if names.count(name) > 1)} is named twice")
    same = all(recipe_of(str(other)).head.num_prototypes == num_prototypes for other in others)
    return plot_curves(rows, out, references=references, num_prototypes=num_prototypes if same else None,
                       name=names[0],
                       others={name: read_log(other, say) for name, other in zip(names[1:], others, strict=True)})


def read_log(run: Path, say: Say | None = None) -> list[dict[str, Any]]:
    """The rows of the log of `run` that can be read; UsageError where there is no log yet, DataError without a row."""
    if not (run / LOG).is_file():
        raise UsageError(f"{run} is not a run folder that has logged yet: it has no {LOG}")
    log = read_run_log(run)
    for problem in log.problems:
        if say:
            say(problem)
    return list(log.rows)


def draw_robustness(results: Path, out: Path, *, dataset: str | None = None,
                    protocol: str | None = None) -> tuple[Path, list[str]]:
    """Write mAP against JPEG quality and share cut away from the Copydays records below `results`.

    With `dataset` and `protocol` only of those. Also returns a sentence for every record that had to be skipped.
    """
    from patchssl.report.plots import plot_robustness

    records, problems = valid_records(results)
    settings = robustness_curves(list(records.values()))
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
