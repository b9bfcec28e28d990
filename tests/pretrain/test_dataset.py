from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import each
from few_images import FewImages, assert_equal, means_and_centers, noise
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from patchssl.pretrain.config import Recipe
from patchssl.pretrain.dataset import EpochSampler, ViewDataset, collate_views
from patchssl.runtime.errors import DataError, UsageError
from patchssl.views.color import draw_sample_colors
from patchssl.views.config import ViewConfig
from patchssl.views.crops import cut_views, draw_views, sample_rng
from patchssl.views.geometry import View
from patchssl.views.patchcolor import NEUTRAL, draw_patches


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def recipe(num_global: int = 2, num_local: int = 2, **photometric) -> Recipe:
    return Recipe.model_validate({
        "model": {"patch_size": 8}, "photometric": photometric,
        "views": {"num_global": num_global, "num_local": num_local, "global_size": 32, "local_size": 16}})


def test_draws_can_be_repeated_and_differ_by_everything_that_names_them():
    def first(*name) -> float:
        return sample_rng(*name).random()

    base = (3, 1, 7, "crops")
    assert first(*base) == first(*base)
    others = [(4, 1, 7, "crops"), (3, 2, 7, "crops"), (3, 1, 8, "crops"), (3, 1, 7, "color"),
              (3, 1, 7, "drop_path"), (3, 1, 7, "masks"), (3, 1, 7, "patch_color"),
              (3, 1, 7, "shuffle"), (1, 3, 7, "crops")]
    assert len({first(*name) for name in [base, *others]}) == len(others) + 1


def test_the_draws_of_a_sample_are_those_of_its_seed_sequence():
    expected = np.random.Generator(np.random.PCG64(np.random.SeedSequence([5, 2, 9, 2]))).random(4)
    assert np.array_equal(sample_rng(5, 2, 9, "drop_path").random(4), expected)


def test_unknown_streams_and_negative_seeds_are_refused():
    with pytest.raises(ValueError, match="did you mean 'crops'"):
        sample_rng(0, 0, 0, "crop")
    with pytest.raises(UsageError, match="seed = -1"):
        sample_rng(-1, 0, 0, "crops")


@settings(max_examples=150, deadline=None)
@given(height=st.integers(1, 60), width=st.integers(1, 60), seed=st.integers(0, 9999))
def test_every_crop_holds_whole_pixels_of_the_image(height, width, seed):
    views = draw_views(rng(seed), height, width, ViewConfig(num_global=2, num_local=3))
    assert [view.size for view in views] == [224, 224, 96, 96, 96]
    for view in views:
        assert all(isinstance(v, int) for v in (view.top, view.left, view.height, view.width))
        assert view.height >= 1 and view.width >= 1
        assert 0 <= view.top <= height - view.height and 0 <= view.left <= width - view.width


def test_crops_are_distributed_as_torchvisions():
    config = ViewConfig(num_global=1, num_local=1, local_scale=(0.05, 0.4))
    image = torch.empty(3, 90, 120)
    ours = [draw_views(rng(seed), 90, 120, config) for seed in range(2000)]
    torch.manual_seed(0)
    for number, scale in enumerate([config.global_scale, config.local_scale]):
        mine = np.array([[v.top, v.left, v.height, v.width] for v in (views[number] for views in ours)])
        theirs = np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in ours])
        for measure in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2],
                        lambda b: b[:, 0], lambda b: b[:, 1], lambda b: b[:, 0] + b[:, 2]):
            assert ks_2samp(measure(mine), measure(theirs)).pvalue > 1e-3


def test_aspect_is_width_by_height():
    config = ViewConfig(aspect=(2.0, 3.0), global_scale=(0.1, 0.3), local_scale=(0.1, 0.3))
    for view in draw_views(rng(), 500, 500, config):
        assert 1.95 < view.width / view.height < 3.05
        assert 0.09 < view.width * view.height / 500**2 < 0.31


@each("height, width", [(4, 400), (400, 4), (1, 50), (50, 1), (7, 61)])
def test_images_that_no_random_crop_fits_give_torchvisions_central_crop(height, width):
    config = ViewConfig(num_global=1, num_local=1, local_scale=(0.9, 1.0), global_scale=(0.9, 1.0), mirror=0)
    top, left, h, w = RandomResizedCrop.get_params(torch.empty(3, height, width), [0.9, 1.0], [3 / 4, 4 / 3])
    assert draw_views(rng(), height, width, config) == [
        View(top, left, h, w, False, 224), View(top, left, h, w, False, 96)]


def test_a_single_pixel_and_an_extreme_aspect_still_make_views():
    config = ViewConfig(num_global=1, num_local=1, aspect=(3.0, 4.0))
    for view in draw_views(rng(), 1, 1, config):
        assert (view.top, view.left, view.height, view.width) == (0, 0, 1, 1)
    assert cut_views(noise(1, 1), [View(0, 0, 1, 1, True, 16)]).shape == (1, 3, 16, 16)


@each("mirror, low, high", [(0, 0, 0), (1, 1, 1), (0.5, 0.45, 0.55)])
def test_share_of_mirrored_views(mirror, low, high):
    views = [v for seed in range(200) for v in draw_views(rng(seed), 40, 40, ViewConfig(mirror=mirror))]
    assert low <= np.mean([v.mirrored for v in views]) <= high


def test_views_do_not_depend_on_how_many_follow():
    few = draw_views(rng(3), 40, 50, ViewConfig(num_local=1))
    assert draw_views(rng(3), 40, 50, ViewConfig(num_local=8))[:3] == few


@each("height, width", [(32, 32), (120, 170)])
@each("size", [16, 64])
def test_cut_views_equal_torchvisions_resized_crop(height, width, size):
    pixels = noise(height, width)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    config = ViewConfig(num_global=6, num_local=6, global_size=size, local_size=size)
    views = draw_views(rng(1), height, width, config)
    assert {view.mirrored for view in views} == {False, True}
    out = cut_views(pixels, views)
    assert out.shape == (12, 3, size, size) and out.dtype == torch.uint8 and out.is_contiguous()
    for view, found in zip(views, out, strict=True):
        expected = tv.resized_crop(image, view.top, view.left, view.height, view.width, [size, size],
                                   interpolation=InterpolationMode.BICUBIC, antialias=True)
        expected = tv.horizontal_flip(expected) if view.mirrored else expected
        assert (found.int() - expected.int()).abs().max() <= 1


def test_a_crop_of_the_views_own_size_is_copied():
    pixels = noise(40, 40)
    crop = pixels[3:19, 5:21].transpose(2, 0, 1)
    plain, mirrored = cut_views(pixels, [View(3, 5, 16, 16, mirror, 16) for mirror in (False, True)])
    assert np.array_equal(plain, crop)
    assert np.array_equal(mirrored, crop[:, :, ::-1])


@pytest.mark.filterwarnings("error")
def test_pixels_may_be_read_only_or_turned():
    pixels = noise(20, 30)
    view = View(0, 0, 20, 30, False, 16)
    expected = cut_views(pixels, [view])
    turned = np.rot90(np.rot90(pixels, -1).copy())
    turned.flags.writeable = False
    assert torch.equal(cut_views(turned, [view]), expected)


@each("box", [(-1, 0, 5, 5), (0, 16, 5, 5), (16, 0, 5, 5), (0, 0, 21, 20)])
def test_a_view_that_leaves_its_image_is_refused(box):
    with pytest.raises(ValueError, match="not inside an image of 20 x 20"):
        cut_views(noise(20, 20), [View(*box, False, 16)])


def test_views_show_what_their_boxes_say():
    # red is the row and green the column of the source, so the mean of a patch is its center in source pixels
    rows, columns = np.mgrid[:200, :200].astype(np.uint8)
    dataset = ViewDataset(FewImages([np.dstack([rows, columns, rows])]), recipe(), seed=0)
    mirrored = set()
    for epoch in range(5):
        sample = dataset[epoch, 0]
        mirrored |= set(sample.mirrored.tolist())
        for found, center in means_and_centers(sample):
            assert (found + 0.5 - center).abs().max() < 0.75
    assert mirrored == {False, True}


@each("num_global, num_local", [(2, 4), (1, 3), (2, 0), (3, 1)])
def test_any_number_of_views(num_global, num_local):
    dataset = ViewDataset(FewImages([noise(20, 20), noise(9, 40)]), recipe(num_global, num_local), 0, 6)
    batch = collate_views([dataset[0, 0], dataset[0, 1]])
    num_views = num_global + num_local
    assert batch.global_views.shape == (2, num_global, 3, 32, 32)
    assert batch.local_views.shape == (2, num_local, 3, 16, 16)
    assert batch.global_views.dtype == batch.local_views.dtype == torch.uint8
    assert batch.boxes.shape == (2, num_views, 4) and batch.boxes.dtype == torch.float64
    assert batch.mirrored.shape == (2, num_views) and batch.mirrored.dtype == torch.bool
    assert batch.drop_path.shape == (2, num_views, 6) and batch.drop_path.dtype == torch.float32
    assert batch.index.tolist() == [0, 1] and batch.index.dtype == torch.int64
    assert batch.global_colors.order.shape == (2, num_global, 16)
    assert batch.local_colors.order.shape == (2, num_local, 4)
    assert batch.unreadable == ()


def test_a_sample_can_be_drawn_again_alone():
    images = FewImages([noise(40, 40, seed) for seed in range(6)])
    walked = ViewDataset(images, recipe(), 1, 4)
    samples = {(epoch, index): walked[epoch, index] for epoch in range(2) for index in (4, 0, 5)}
    alone = ViewDataset(images, recipe(), 1, 4)
    assert_equal(alone[1, 5], samples[1, 5])
    for other in (samples[0, 5], samples[1, 4], ViewDataset(images, recipe(), 2, 4)[1, 5]):
        assert not np.array_equal(other.boxes, samples[1, 5].boxes)
        assert not np.array_equal(other.drop_path, samples[1, 5].drop_path)


def test_color_and_drop_path_have_streams_of_their_own():
    colored = recipe(jitter=0.5, grayscale=0.5)
    sample = ViewDataset(FewImages([noise(20, 20)] * 3), colored, 7, 3)[4, 2]
    expected = draw_sample_colors(sample_rng(7, 4, 2, "color"), colored.photometric, 2, 2, 16, 4)
    for found, draws in zip((sample.global_colors, sample.local_colors), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, draws, strict=True))
    assert np.array_equal(sample.drop_path, sample_rng(7, 4, 2, "drop_path").random((4, 3), dtype=np.float32))


def test_draws_of_patches_have_a_stream_of_their_own():
    layered = recipe(patch_share=0.6)
    sample = ViewDataset(FewImages([noise(20, 20)] * 3), layered, 7, 3)[4, 2]
    expected = draw_patches(sample_rng(7, 4, 2, "patch_color"), layered.photometric, 2, 2, 16, 4)
    for found, draws in zip((sample.global_patches, sample.local_patches), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, draws, strict=True))
    assert not torch.equal(sample.global_patches.strengths, ViewDataset(
        FewImages([noise(20, 20)] * 3), layered, 7, 3)[4, 1].global_patches.strengths)


@each("mode, share", [("none", 1), ("replace", 0), ("layered", 0), ("layered", 0.5), ("layered", 1)])
def test_patch_wise_color_leaves_all_other_draws_as_they_were(mode, share):
    """`none` is what versions drew that did not know `patchwise`, with a share of 0."""
    def sample(color):
        values = recipe(**color).model_dump() | {"masks": {"matched": True, "probability": 1, "ratio": (0.3, 0.3)}}
        values["loss"]["matches_per_pair"] = 2
        return ViewDataset(FewImages([noise(30, 40)] * 3), Recipe.model_validate(values), 7, 3)[4, 2]

    found, expected = sample({"patchwise": mode, "patch_share": share}), sample({"patchwise": "none"})
    assert found.masks.any() and found.match_draws.size
    num_patches = {"global": 16, "local": 4} if mode == "layered" and share else {}
    assert found.global_patches.order.shape == ((2, num_patches["global"]) if num_patches else (0, 0))
    assert found.local_patches.strengths.shape == ((2, num_patches["local"], 5) if num_patches else (0, 0, 5))
    kept = {name: getattr(expected, name) for name in ("global_patches", "local_patches")}
    assert_equal(replace(found, **kept), expected)


def test_a_share_of_views_has_its_patches_changed_and_the_others_none():
    dataset = ViewDataset(FewImages([noise(20, 20)]), recipe(patch_share=0.3), 0)
    batch = collate_views([dataset[epoch, 0] for epoch in range(300)])
    for draws in (batch.global_patches, batch.local_patches):
        changed = (draws.strengths != torch.tensor(NEUTRAL)).any(-1)
        assert torch.equal(changed.any(-1), changed.all(-1))  # a blur and a jitter of each patch, or of none
        assert changed.any(-1).float().mean() == pytest.approx(0.3, abs=0.06)


def test_draws_of_patches_travel_with_their_batch():
    dataset = ViewDataset(FewImages([noise(20, 20)] * 6), recipe(), 0, 2)
    samples = [dataset[0, index] for index in range(6)]
    batch = collate_views(samples)
    assert batch.global_patches.strengths.shape == (6, 2, 16, 5) and batch.local_patches.order.shape == (6, 2, 4)
    moved = batch.to("meta")
    for name in ("global_patches", "local_patches"):
        parts = [getattr(part, name) for part in batch.split(3)]
        assert [part.order.shape[0] for part in parts] == [2, 2, 2]
        assert torch.equal(torch.cat([part.strengths for part in parts]), getattr(batch, name).strengths)
        for field in range(2):
            assert torch.equal(getattr(batch, name)[field], torch.stack([getattr(one, name)[field] for one in samples]))
        assert torch.equal(getattr(batch, name).flatten().order[3], getattr(samples[1], name).order[1])
        assert getattr(moved, name) is getattr(batch, name)  # read on the CPU
    assert len(torch.unique(torch.cat([batch.global_patches.strengths.flatten(0, 2),
                                       batch.local_patches.strengths.flatten(0, 2)]), dim=0)) == 6 * (2 * 16 + 2 * 4)


def test_images_that_share_a_batch_share_the_draws_of_their_patches():
    parts = recipe().model_dump()
    parts["views"]["shared_in_batch"] = True
    dataset = ViewDataset(FewImages([noise(20, 20 + index) for index in range(3)]), Recipe.model_validate(parts), 0, 2)
    samples = [dataset[1, index, 4] for index in range(3)]
    batch, other = collate_views(samples, shared=True), dataset[1, 0, 5]
    assert_equal(batch, collate_views(samples))
    for name in ("global_patches", "local_patches"):
        found = getattr(batch, name)
        assert torch.equal(found.strengths, found.strengths[:1].expand_as(found.strengths))
        assert torch.equal(found.order, found.order[:1].expand_as(found.order))
        assert len(torch.unique(found.strengths[0].flatten(0, 1), dim=0)) == found.order[0].numel()
        assert not torch.equal(getattr(other, name).strengths, found.strengths[0])
    expected = draw_patches(sample_rng(0, 1, 4, "patch_color"), dataset.recipe.photometric, 2, 2, 16, 4)
    assert torch.equal(batch.global_patches.strengths[2], expected[0].strengths)


def test_workers_and_processes_draw_the_same_batches():
    dataset = ViewDataset(FewImages([noise(24, 24, seed) for seed in range(8)]), recipe(), 0, 2)
    sampler = EpochSampler(8, 4, epochs=2, seed=0)
    alone, shared = (list(DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_views, num_workers=n))
                     for n in (0, 2))
    assert len(alone) == 4
    for one, other in zip(alone, shared, strict=True):
        assert_equal(one, other)


def few_unreadable(total: int, *bad: int) -> FewImages:
    shared = noise(12, 12)
    return FewImages([None if index in bad else shared for index in range(total)])


def test_an_unreadable_image_is_replaced_by_the_next_and_named():
    dataset = ViewDataset(few_unreadable(400, 7, 8, 399), recipe(), 0)
    sample = dataset[0, 7]
    assert sample.index == 9
    assert sample.unreadable == (("7.jpg", "truncated"), ("8.jpg", "truncated"))
    assert dataset[0, 399].index == 0
    assert dataset[0, 399].unreadable == (("399.jpg", "truncated"),)
    assert dataset[0, 6].unreadable == ()
    batch = collate_views([dataset[0, i] for i in (6, 7, 399)])
    assert batch.unreadable == tuple((name, "truncated") for name in ("7.jpg", "8.jpg", "399.jpg"))
    assert batch.index.tolist() == [6, 9, 0]
    assert_equal(sample, dataset[0, 7])


def test_a_set_that_begins_with_unreadable_images_is_refused_at_once():
    assert ViewDataset(few_unreadable(300, 0, 1, 2), recipe(), 0)[0, 0].index == 3
    with pytest.raises(DataError, match=r"(?s)0\.jpg.*3\.jpg"):
        ViewDataset(few_unreadable(300, 0, 1, 2, 3), recipe(), 0)


def test_a_set_that_became_unreadable_says_so():
    images = few_unreadable(3)
    dataset = ViewDataset(images, recipe(), 0)
    images.images[:] = [None] * 3
    with pytest.raises(DataError, match="none of the 3 images of few"):
        dataset[0, 1]


def test_a_batch_moves_what_the_networks_see():
    dataset = ViewDataset(FewImages([noise(20, 20)]), recipe(), 0, 2)
    batch = collate_views([dataset[0, 0]])
    moved = batch.to("meta", non_blocking=True)
    for name in ("boxes", "mirrored", "index", "match_draws"):  # the plan is made of them, on the CPU
        assert getattr(moved, name) is getattr(batch, name)
    for name in ("global_views", "local_views", "drop_path", "masks"):
        assert getattr(moved, name).is_meta
        assert getattr(moved, name).shape == getattr(batch, name).shape
    assert all(field.device.type == "cpu" for field in (*moved.global_colors, *moved.local_colors))
    assert_equal(batch.to("cpu"), batch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_pinned_batch_is_the_same_batch():
    dataset = ViewDataset(FewImages([noise(20, 20)] * 2), recipe(), 0, 2)
    loader = DataLoader(dataset, batch_sampler=EpochSampler(2, 2, epochs=1, seed=0), collate_fn=collate_views,
                        pin_memory=True)
    batch = next(iter(loader))
    assert batch.global_views.is_pinned() and not batch.boxes.is_pinned()
    assert_equal(batch.to("cuda", non_blocking=True).to("cpu"), batch)


def test_an_epoch_holds_every_image_once_but_for_the_rest():
    batches = list(EpochSampler(23, 5, epochs=3, seed=0))
    assert len(batches) == len(EpochSampler(23, 5, epochs=3, seed=0)) == 12
    for epoch in range(3):
        keys = [key for batch in batches[4 * epoch:4 * epoch + 4] for key in batch]
        assert {e for e, _, _ in keys} == {epoch}
        assert [number for _, _, number in keys] == [place // 5 for place in range(20)]
        indices = [index for _, index, _ in keys]
        assert len(set(indices)) == 20 and set(indices) <= set(range(23))
        assert indices != sorted(indices)
    orders = {tuple(index for batch in batches[i:i + 4] for _, index, _ in batch) for i in (0, 4, 8)}
    assert len(orders) == 3
    assert batches != list(EpochSampler(23, 5, epochs=3, seed=1))


def test_the_shuffle_is_not_the_crops_of_the_first_image():
    order = [index for _, index, _ in next(iter(EpochSampler(50, 50, epochs=1, seed=0)))]
    assert order != sample_rng(0, 0, 0, "crops").permutation(50).tolist()


@each("start_step", [0, 3, 4, 7, 11, 12, 40])
def test_starting_later_gives_the_rest_of_the_same_sequence(start_step):
    batches = list(EpochSampler(23, 5, epochs=3, seed=0))
    late = EpochSampler(23, 5, epochs=3, seed=0, start_step=start_step)
    assert list(late) == batches[start_step:]
    assert len(late) == len(batches[start_step:])


def test_ranks_share_the_batches_of_one_process():
    whole = list(EpochSampler(50, 12, epochs=2, seed=0))
    ranks = [list(EpochSampler(50, 12, epochs=2, seed=0, rank=rank, world_size=3)) for rank in range(3)]
    assert [a + b + c for a, b, c in zip(*ranks, strict=True)] == whole


def test_sets_smaller_than_a_batch_and_uneven_shares_are_refused_by_name():
    with pytest.raises(UsageError, match=r"optim\.batch_size = 10 .* 9 images"):
        EpochSampler(9, 10, epochs=1, seed=0)
    with pytest.raises(UsageError, match=r"optim\.batch_size = 10 .* 4 processes"):
        EpochSampler(50, 10, epochs=1, seed=0, world_size=4)
