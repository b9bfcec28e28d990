"""The views that sheets show: those of training, and what is patch by patch about their color."""

import numpy as np
import pytest
import torch
from cases import each

from patchssl.pretrain.config import Recipe
from patchssl.pretrain.recipe import load_recipe
from patchssl.report.figures.tokens import read_image
from patchssl.report.figures.views import (
    COMPARED_LOCALS,
    FACTOR,
    amplified,
    color_title,
    compared_sheets,
    recolored,
    sheet_of_views,
    view_names,
    views_of,
)
from patchssl.runtime.errors import UsageError
from patchssl.views.color import draw_sample_colors
from patchssl.views.crops import cut_views, draw_views, sample_rng
from patchssl.views.plaincolor import color_view

SIZES = ("model.patch_size=8", "views.global_size=32", "views.local_size=16", "views.num_local=4")
MODES = ("none", "layered", "replace")


@pytest.fixture(scope="module")
def recipe():
    """Views of 4 x 4 and 2 x 2 patches, every third of them colored patch by patch."""
    return load_recipe("quickstart", (*SIZES, "photometric.patchwise=replace", "photometric.patch_share=0.33"))


@pytest.fixture
def pixels(photo):
    return read_image(str(photo))


def draws_of(recipe, seed, index):
    """Draws of color of the global and the local views, by the recipe's own stream."""
    patches = [(size // recipe.model.patch_size) ** 2 for size in (recipe.views.global_size, recipe.views.local_size)]
    return draw_sample_colors(sample_rng(seed, 0, index, "color"), recipe.photometric, recipe.views.num_global,
                              recipe.views.num_local, *patches)


@each(("mode", "seed", "index"), [("none", 0, 0), ("none", 3, 2), ("replace", 3, 2)])
def test_views_are_the_crops_colored_as_the_plain_reading_says(recipe, pixels, mode, seed, index):
    recipe = recolored(recipe, mode)
    geometry, crops, colored = views_of(pixels, recipe, seed, index)
    assert geometry == draw_views(sample_rng(seed, 0, index, "crops"), *pixels.shape[:2], recipe.views)
    draws = [type(part)(*fields) for part in draws_of(recipe, seed, index) for fields in zip(*part, strict=True)]
    for view, crop, seen, drawn in zip(geometry, crops, colored, draws, strict=True):
        cut = cut_views(pixels, [view])[0]
        assert np.array_equal(crop, cut.permute(1, 2, 0))
        expected = color_view(cut / 255, drawn, recipe.model.patch_size).permute(1, 2, 0) * 255
        assert np.abs(seen - expected.numpy()).max() <= 0.75  # half a step of uint8, and rounding


def test_crops_are_the_same_under_every_kind_of_color(recipe, pixels):
    first, *others = [views_of(pixels, recolored(recipe, mode), seed=1).crops for mode in MODES]
    assert all(np.array_equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_those_views_say_patch_by_patch_that_were_drawn_so(recipe, pixels):
    found = set()
    for seed in range(4):
        sheet = sheet_of_views(pixels, recipe, seed, 0)
        marked = [caption.endswith("\npatch by patch") for caption in sheet.captions]
        assert marked == [False, *torch.cat([part.replaced for part in draws_of(recipe, seed, 0)]).tolist()]
        assert [caption.splitlines()[0] for caption in sheet.captions] == ["image", *view_names(recipe)]
        found |= set(marked[1:])
    assert found == {True, False}
    for share in (0.0, 1.0):
        photometric = recipe.photometric.model_copy(update={"patch_share": share})
        captions = sheet_of_views(pixels, recipe.model_copy(update={"photometric": photometric}), 0, 0).captions
        assert {"patch by patch" in caption for caption in captions[1:]} == {bool(share)}


def layered(recipe, share=1.0, **patch):
    """`recipe` with layered color in a share of the views, with other strengths."""
    photometric = recipe.photometric.model_dump() | {"patchwise": "layered", "patch_share": share, "patch": patch}
    return Recipe.model_validate(recipe.model_dump() | {"photometric": photometric})


def test_layered_color_is_that_of_the_whole_view_where_patches_are_left_alone(recipe, pixels):
    alone = layered(recipe, jitter=0, blur=0, sharpen=0, posterize=0)
    whole = views_of(pixels, recolored(recipe, "none"), 3).colored
    for seen, same in zip(views_of(pixels, alone, 3).colored, whole, strict=True):
        assert np.abs(seen.astype(int) - same).max() <= 1
    assert not any("patch by patch" in caption for caption in sheet_of_views(pixels, alone, 3, 0).captions)


def test_layered_color_changes_each_patch_of_the_colored_view(recipe, pixels):
    posterized = layered(recipe, jitter=0, blur=0, sharpen=0, posterize=1, posterize_bits=3)
    whole = views_of(pixels, recolored(recipe, "none"), 3).colored
    for seen, same in zip(views_of(pixels, posterized, 3).colored, whole, strict=True):
        assert not (seen % 32).any()
        assert ((seen == same // 32 * 32) | (same % 32 == 0) | (same % 32 == 31)).all()  # those may round to either
    assert all("patch by patch" in caption for caption in sheet_of_views(pixels, posterized, 3, 0).captions[1:])


def test_layered_color_of_some_views_marks_those(recipe, pixels):
    some = layered(recipe, share=0.5)
    found = [["patch by patch" in caption for caption in sheet_of_views(pixels, some, seed, 0).captions[1:]]
             for seed in range(4)]
    assert {mark for row in found for mark in row} == {True, False}
    none, every = (views_of(pixels, layered(recipe, share=share), 0).colored for share in (0, 1))
    for view, whole, patches, marked in zip(views_of(pixels, some, 0).colored, none, every, found[0], strict=True):
        assert np.abs(view.astype(int) - (patches if marked else whole)).max() <= 1


def test_a_comparison_shows_the_same_views_before_color_and_under_each_kind(recipe, pixels):
    rows = compared_sheets(pixels, recipe, seed=2, index=1)
    none, layered, replace = (views_of(pixels, recolored(recipe, mode), 2, 1) for mode in MODES)
    shown = recipe.views.num_global + COMPARED_LOCALS
    assert [len(row.images) for row in rows] == [len(row.captions) for row in rows] == [1 + shown] * 5
    assert np.array_equal(rows[0].images[0], pixels)
    assert rows[0].captions[:2] == ["image", "global 1,\nbefore color"]
    words = [row.images[0].splitlines()[0] for row in rows[1:]]
    assert words == ["none", "layered", "layered − none", "replace"]
    assert f"{FACTOR} times" in rows[3].images[0]
    for row, expected in zip((0, 1, 2, 4), (none.crops, none.colored, layered.colored, replace.colored), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(rows[row].images[1:], expected[:shown], strict=True))
    for seen, after, before in zip(rows[3].images[1:], layered.colored, none.colored, strict=False):
        assert seen.tolist() == (128 + FACTOR * (after.astype(int) - before)).clip(0, 255).tolist()


def test_a_comparison_has_no_more_local_views_than_the_recipe(recipe, pixels):
    views = recipe.views.model_copy(update={"num_local": 0})
    rows = compared_sheets(pixels, recipe.model_copy(update={"views": views}), 0, 0)
    assert [len(row.images) for row in rows] == [3] * 5


def test_a_difference_is_amplified_around_gray_and_cut_off():
    before = np.array([[[100, 100, 100]], [[0, 255, 7]]], np.uint8)
    after = np.array([[[101, 98, 100]], [[255, 0, 40]]], np.uint8)
    assert amplified(after, before, 4).tolist() == [[[132, 120, 128]], [[255, 0, 255]]]
    assert amplified(after, before, 0.5).tolist() == [[[128, 127, 128]], [[255, 0, 144]]]  # halves to even


@each(("photometric", "expected"), [
    ({}, "color: layered (the whole view, then each patch) in every view"),
    ({"patchwise": "none"}, "color: none (the whole view) in every view"),
    ({"patchwise": "layered", "patch_share": 0}, "color: none (the whole view) in every view"),
    ({"patchwise": "replace", "patch_share": 0.29},
     "color: replace (each patch instead of the whole view) in 29% of views, marked; the others as a whole"),
])
def test_the_title_names_the_kind_of_color_and_its_share(photometric, expected):
    assert color_title(Recipe.model_validate({"photometric": photometric})) == expected


def test_baselines_can_be_shown_under_another_color():
    recipe = Recipe(method="dino")
    assert color_title(recolored(recipe, "layered")).startswith("color: layered")


def test_an_unknown_kind_of_color_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match=r"'replac' is unknown; did you mean 'replace'.*all, layered, none, replace"):
        recolored(Recipe(), "replac")
