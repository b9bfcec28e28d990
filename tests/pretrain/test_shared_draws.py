"""`views.shared_in_batch`: one augmentation for all images of an update, and its matches found once."""

import numpy as np
import pytest
import torch
from cases import each
from few_images import FewImages, assert_equal, means_and_centers, noise
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import make_batch, make_recipe

from patchssl.pretrain import pairs
from patchssl.pretrain.dataset import EpochSampler, ViewDataset, collate_views, make_loader
from patchssl.pretrain.pairs import plan_batch, plan_matches
from patchssl.views.color import draw_sample_colors
from patchssl.views.config import ViewConfig
from patchssl.views.crops import cut_views, draw_views, fit_views
from patchssl.views.geometry import View

SHARED, ALONE = ViewConfig(shared_in_batch=True, num_local=3), ViewConfig(num_local=3)
SIZES = ((40, 40), (1, 1), (1, 300), (300, 2), (64, 90), (500, 333))
DRAWN = {"loss": {"matches_per_pair": 2, "rule": "random"}}  # matches that need draws


def shared_recipe(views=None, **parts):
    return make_recipe(views={"shared_in_batch": True, **(views or {})}, **parts)


def dataset_of(recipe, seed=7, sizes=SIZES):
    return ViewDataset(FewImages([noise(*size) for size in sizes]), recipe, seed, 3)


def stream(*name):
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(name)))


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def common(sample):
    """All that the images of a batch share, as arrays."""
    return [np.asarray(x) for x in (sample.boxes, sample.mirrored, sample.match_draws, *sample.global_colors,
                                    *sample.local_colors)]


def test_images_of_any_size_in_a_batch_share_their_draws():
    dataset = dataset_of(shared_recipe(masks={"matched": True, "start_epoch": 0}, **DRAWN))
    first, *others = [dataset[2, index, 4] for index in range(len(SIZES))]
    for sample in others:
        assert all(np.array_equal(a, b) for a, b in zip(common(first), common(sample), strict=True))
        assert not np.array_equal(sample.drop_path, first.drop_path)
    assert len({sample.masks.tobytes() for sample in (first, *others)}) > 1  # some have none at all


@each("key, seed", [((2, 0, 5), 7), ((3, 0, 4), 7), ((2, 0, 4), 8)])
def test_another_batch_epoch_or_seed_draws_anew(key, seed):
    recipe = shared_recipe(**DRAWN)
    first, other = dataset_of(recipe)[2, 0, 4], dataset_of(recipe, seed)[key]
    assert not np.array_equal(other.boxes, first.boxes)
    assert not np.array_equal(other.match_draws, first.match_draws)
    assert not torch.equal(other.global_colors.factors, first.global_colors.factors)


def test_the_draws_are_those_of_seed_epoch_and_batch():
    recipe = shared_recipe(views={"num_local": 2}, **DRAWN)
    sample = dataset_of(recipe)[2, 1, 4]
    views = draw_views(stream(7, 2, 4, 0), 256, 256, make_recipe().views)  # of an image of the square's size
    assert sample.boxes.tolist() == [[v.top, v.left, v.height, v.width] for v in views]
    assert sample.mirrored.tolist() == [v.mirrored for v in views]
    colors = draw_sample_colors(stream(7, 2, 4, 1), recipe.photometric, 2, 2, 9, 4)
    assert equal(sample.global_colors, colors[0]) and equal(sample.local_colors, colors[1])
    assert np.array_equal(sample.match_draws, stream(7, 2, 4, 5).random((2, 2, 4, 9), dtype=np.float32))
    assert np.array_equal(sample.drop_path, stream(7, 2, 1, 2).random((4, 3), dtype=np.float32))  # the image's own


def test_a_batchs_number_changes_nothing_where_images_have_draws_of_their_own():
    dataset = dataset_of(make_recipe(**DRAWN))
    assert_equal(dataset[2, 0, 4], dataset[2, 0])


def test_shared_draws_need_the_batchs_number():
    with pytest.raises(ValueError, match=r"shared_in_batch = true, but \(2, 0\) names no batch"):
        dataset_of(shared_recipe())[2, 0]


@settings(max_examples=150, deadline=None)
@given(height=st.integers(1, 700), width=st.integers(1, 700), seed=st.integers(0, 999))
def test_a_view_covers_the_same_share_of_every_image(height, width, seed):
    views = draw_views(np.random.default_rng(seed), height, width, SHARED)
    assert views == draw_views(np.random.default_rng(seed), 256, 256, ALONE)
    fitted, pixels = fit_views(views, np.zeros((height, width, 3), np.uint8), SHARED)
    assert pixels.shape == (max(height, 256), max(width, 256), 3)
    for view, placed in zip(views, fitted, strict=True):
        for side, begin, end, placed_begin, length in (
                (pixels.shape[0], view.top, view.top + view.height, placed.top, placed.height),
                (pixels.shape[1], view.left, view.left + view.width, placed.left, placed.width)):
            assert isinstance(placed_begin, int) and length >= 1 and 0 <= placed_begin <= side - length
            assert abs(placed_begin - begin * side / 256) <= 0.5 and abs(placed_begin + length - end * side / 256) <= .5
        assert (placed.mirrored, placed.size) == (view.mirrored, view.size)


def test_the_smallest_views_at_every_place_keep_a_pixel():
    for side in (1, 255, 256, 257, 300, 383):
        views = [View(place, 255 - place, 1, 1, False, 16) for place in range(256)]
        fitted, pixels = fit_views(views, noise(side, side), SHARED)
        assert cut_views(pixels, fitted).shape == (256, 3, 16, 16)  # which refuses what is not inside
        assert sum(view.height for view in fitted) == max(side, 256)  # they tile the image


def test_an_image_of_the_squares_size_is_cut_as_ever():
    pixels, views = noise(256, 256), draw_views(np.random.default_rng(3), 9, 9, SHARED)
    fitted, same = fit_views(views, pixels, SHARED)
    assert fitted == views and same is pixels
    small = noise(20, 30)
    views = draw_views(np.random.default_rng(3), 20, 30, ALONE)
    fitted, same = fit_views(views, small, ALONE)
    assert fitted == views and same is small


@each("height, width", [(256, 256), (200, 500), (900, 333), (64, 90)])
def test_views_show_what_their_boxes_say_of_any_image(height, width):
    """Red is the share of the height above a pixel, green of the width left of it: patches tell where they lie."""
    rows, columns = ((np.arange(side) + 0.5) / side * 255 for side in (height, width))
    red, green = np.meshgrid(rows, columns, indexing="ij")
    pixels = np.dstack([red, green, red]).round().astype(np.uint8)
    dataset = ViewDataset(FewImages([pixels]), shared_recipe(), seed=0)
    mirrored = set()
    for batch in range(6):
        sample = dataset[0, 0, batch]
        mirrored |= set(sample.mirrored.tolist())
        for found, center in means_and_centers(sample):
            assert (found / 255 * 256 - center).abs().max() < 1.5  # of 256: rounding, 8 bits, blurred borders
    assert mirrored == {False, True}


def loaded(recipe, workers, start_step=0):
    images = FewImages([noise(*SIZES[index % len(SIZES)], index) for index in range(14)])
    return list(make_loader(recipe, images, 0, 2, start_step=start_step, workers=workers))


def test_workers_and_a_later_start_draw_the_same_batches():
    recipe = shared_recipe(optim={"epochs": 2}, **DRAWN)
    alone, helped, late = loaded(recipe, 0), loaded(recipe, 2), loaded(recipe, 1, start_step=3)
    assert (len(alone), len(late)) == (4, 1)
    for one, other in zip([*alone, alone[3]], [*helped, *late], strict=True):
        assert_equal(one, other)
    drawn = {batch.boxes[0].numpy().tobytes() for batch in alone}
    assert len(drawn) == 4  # batches, of two epochs
    for batch in helped:  # what they share was sent once
        for draws in (*batch.global_colors, *batch.local_colors, batch.match_draws):
            assert len(draws) == 6 and draws.untyped_storage().nbytes() == draws[0].numel() * draws.element_size()


def test_a_batch_that_holds_its_draws_once_says_what_its_samples_say():
    dataset = dataset_of(shared_recipe(**DRAWN))
    samples = [dataset[0, index, 1] for index in range(4)]
    one, other = collate_views(samples, shared=True), collate_views(samples)
    assert_equal(one, other)
    for a, b in zip(one.split(2), other.split(2), strict=True):
        assert_equal(a, b)


def test_processes_draw_what_one_would():
    dataset = ViewDataset(FewImages([noise(30, 40, index) for index in range(14)]), shared_recipe(**DRAWN), 0, 2)
    whole, *ranks = [[collate_views([dataset[key] for key in keys]) for keys in
                      EpochSampler(14, 6, epochs=1, seed=0, rank=rank, world_size=world_size)]
                     for rank, world_size in ((0, 1), (0, 3), (1, 3), (2, 3))]
    for step, batch in enumerate(whole):
        for part, of_rank in zip(batch.split(3), (rank[step] for rank in ranks), strict=True):
            assert_equal(part, of_rank)


TWO_GLOBALS = {"num_global": 2, "num_local": 0}
TINY = {"global_scale": [0.01, 0.02], "local_scale": [0.01, 0.02]}  # few pairs of views overlap


@each("weighting", ["balanced", "paper", "lambda", "lambda-sum"])
@each("rule, limit", [("center", 0), ("center", 2), ("paper", 0), ("random", 0), ("random", 2), ("similarity", 3)])
@each("views", [{}, TINY, TWO_GLOBALS, {"num_global": 1, "num_local": 3}, TINY | TWO_GLOBALS])
def test_matches_found_once_are_those_found_image_by_image(views, rule, limit, weighting):
    recipe = shared_recipe(views, loss={"rule": rule, "matches_per_pair": limit, "weighting": weighting})
    for step in range(4):
        batch = make_batch(recipe, step)
        once, each_image = plan_batch(batch, recipe), plan_matches(batch.boxes, batch.mirrored, recipe,
                                                                   batch.match_draws)
        assert equal(once[:-1], each_image[:-1])
        assert [x.dtype for x in once[:-1]] == [x.dtype for x in each_image[:-1]]
        assert equal(once.groups[:3], each_image.groups[:3])
        assert once.groups[3:] == each_image.groups[3:]


@each("shared, images", [(True, 1), (False, 6)])
def test_geometry_is_matched_once_for_a_batch(shared, images, monkeypatch):
    matched = []

    def count(teacher, student, patch_size, rule):
        matched.append(len(teacher.boxes))
        return match_crops(teacher, student, patch_size, rule)

    match_crops = pairs.match_crops
    monkeypatch.setattr(pairs, "match_crops", count)
    recipe = shared_recipe({"shared_in_batch": shared})
    plan_batch(make_batch(recipe), recipe)
    assert matched == [images] * 2  # global and local student views


@each("method", ["dino", "ibot"])
def test_methods_without_matches_share_views_too(method):
    recipe, alone = (make(method=method, masks={"start_epoch": 0}) for make in (shared_recipe, make_recipe))
    batch, apart = make_batch(recipe), make_batch(alone)
    assert (batch.boxes == batch.boxes[0]).all() and not (apart.boxes == apart.boxes[0]).all()
    assert torch.equal(batch.masks, apart.masks)  # drawn for every image, from its own number
    if method == "ibot":
        assert batch.masks.any() and not (batch.masks == batch.masks[0]).all()
    assert equal(plan_batch(batch, recipe)[:-1], plan_batch(apart, alone)[:-1])


def test_a_batch_still_cannot_be_cut_into_unequal_parts():
    with pytest.raises(ValueError, match=r"optim\.accumulate = 4"):
        shared_recipe(optim={"accumulate": 4})
