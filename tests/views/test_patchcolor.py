"""Layered patch-wise color against torchvision, patch by patch, and what its draws are."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from cases import each
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchssl.views import patchcolor
from patchssl.views.patchcolor import NEUTRAL, ORDERS, STEPS, PatchDraws, apply_patches
from patchssl.views.plaincolor import change_patch, change_patches

SIZES = [1, 2, 3, 4, 7, 8, 14, 16]  # pixels of a patch's side
KINDS = ("noise", "gray", "black and white", "pure", "bright", "dark", "ramp", "constant")
RARE = 1e-3  # of values after blur or hue, whose float32 sums may fall on the other side of a level
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WIDE = {"brightness": (0.5, 1.6), "hue": (-0.5, 0.5), "blur": (0.1, 2.0)}


def some_patches(count: int, size: int, seed: int = 0) -> Tensor:
    """(count, 3, size, size) uint8: the KINDS in turn, bright ones with a channel or two at the very top."""
    rng = np.random.default_rng([seed, size])
    patches = rng.integers(0, 256, (count, 3, size, size))
    black, ramp = patches[:, :1] // 128 * 255, np.linspace(0, 255, size).astype(int)[:, None]
    made = {"noise": patches, "gray": patches[:, :1], "black and white": black, "pure": patches // 128 * 255,
            "bright": np.where(rng.random(patches.shape) < 0.5, 255, 200 + patches // 5), "dark": patches // 32,
            "ramp": ramp * np.array([1, 0.5, 0.2])[:, None, None], "constant": patches[:, :, :1, :1]}
    for number, kind in enumerate(KINDS):
        patches[number::len(KINDS)] = np.broadcast_to(made[kind], patches.shape)[number::len(KINDS)]
    return torch.from_numpy(patches.astype(np.uint8))


def put(patches: Tensor, per_side: int) -> Tensor:
    """Patches (M * per_side^2, 3, p, p) as float views (M, 3, S, S), row by row."""
    size = patches.shape[-1]
    views = patches.view(-1, per_side, per_side, 3, size, size).permute(0, 3, 1, 4, 2, 5)
    return views.reshape(-1, 3, per_side * size, per_side * size).float() / 255


def cut(views: Tensor, size: int) -> Tensor:
    """The patches of `views`, as `put` takes them, in levels of 8 bits, not rounded."""
    per_side = views.shape[-1] // size
    patches = views.view(-1, 3, per_side, size, per_side, size).permute(0, 2, 4, 1, 3, 5)
    return 255 * patches.reshape(-1, 3, size, size)


def draws_of(count: int, patches: int, order: Tensor | int = 0, **strengths: object) -> PatchDraws:
    """Draws for so many views that change nothing, but for what `strengths` say, broadcast to (count, patches)."""
    values = torch.tensor(NEUTRAL).repeat(count, patches, 1)
    for name, strength in strengths.items():
        values[..., STEPS.index(name)] = torch.as_tensor(strength, dtype=torch.float32)
    return PatchDraws(values, torch.as_tensor(order, dtype=torch.uint8).expand(count, patches).contiguous())


def wide_draws(count: int, patches: int, seed: int = 0) -> PatchDraws:
    """All five steps of each patch, far beyond what recipes ask for, in orders drawn anew."""
    rng = np.random.default_rng(seed)
    strengths = {name: rng.uniform(low, high, (count, patches)) for name, (low, high) in WIDE.items()}
    strengths["posterize"] = rng.integers(1, 8, (count, patches))
    strengths["sharpness"] = rng.choice([0, 0.5, 1.5, 2, 3], (count, patches))  # floats without rounding
    return draws_of(count, patches, torch.from_numpy(rng.integers(0, len(ORDERS), (count, patches))), **strengths)


def applied(views: Tensor, draws: PatchDraws, size: int, *scale_and_shift: object) -> Tensor:
    changed = views.clone()
    apply_patches([changed], [draws], size, *scale_and_shift)
    return changed


def plain(views: Tensor, draws: PatchDraws, size: int) -> Tensor:
    return torch.stack([change_patches(view, PatchDraws(*fields), size)
                        for view, *fields in zip(views, *draws, strict=True)])


def levels(views: Tensor) -> Tensor:
    """Views as the whole levels of 8 bits that they are."""
    rounded = (255 * views).round()
    assert (255 * views - rounded).abs().max() < 1e-3
    return rounded


def differing(one: Tensor, other: Tensor) -> float:
    """The share of values whose levels differ."""
    assert one.shape == other.shape
    return float((levels(one) != levels(other)).float().mean())


# each operation alone

def blurred(patches: Tensor, sigma: float) -> Tensor:
    """One pixel wide and five high, or as high as the reflected patch allows."""
    reach = min(2, patches.shape[-1] - 1)
    return tv.gaussian_blur(patches, [1, 2 * reach + 1], [sigma, sigma])


ALONE: dict[str, tuple[Callable[[Tensor, float], Tensor], list[float]]] = {
    "brightness": (tv.adjust_brightness, [0.0, 0.5, 0.9, 0.95, 1.05, 1.1, 1.7, 3.0]),
    "hue": (tv.adjust_hue, [-0.5, -0.31, -0.1, -0.01, 0.01, 0.07, 0.1, 1 / 3, 0.5]),
    "blur": (blurred, [0.1, 0.2, 0.4, 0.9, 1.4, 2.0, 30.0]),
    "sharpness": (tv.adjust_sharpness, [0.0, 0.5, 2.0, 3.0]),
    "posterize": (lambda patches, bits: tv.posterize(patches, int(bits)), [1, 2, 3, 4, 5, 6, 7]),
}
EXACT = ("brightness", "sharpness", "posterize")


@pytest.mark.parametrize("step", STEPS)
@each("size", SIZES)
def test_each_operation_alone_is_torchvisions_on_the_patch(step: str, size: int) -> None:
    patches = some_patches(8 * len(KINDS) * 9, size)
    views = put(patches, 3)
    function, strengths = ALONE[step]
    for strength in strengths:
        changed = cut(applied(views, draws_of(len(views), 9, **{step: strength}), size), size)
        expected = function(patches, strength).float()
        off = (changed - expected).abs()
        assert off.max() < (1e-3 if step in EXACT else 1.001), (strength, off.max())
        assert (off > 1e-3).float().mean() < RARE, strength
        moved = (expected != patches).float().mean()
        assert moved > 0.05 or size < 4 or (step, strength) in {("blur", 0.1), ("blur", 0.2), ("hue", 0.01),
                                                                ("hue", -0.01)}, (strength, moved)


def test_torchvision_leaves_the_smallest_patches_unsharpened_and_a_pixel_unblurred() -> None:
    for size in (1, 2):
        views = put(some_patches(64, size), 2)
        assert torch.equal(levels(applied(views, draws_of(16, 4, sharpness=2.0), size)), levels(views))
    views = put(some_patches(64, 1), 2)
    assert torch.equal(levels(applied(views, draws_of(16, 4, blur=2.0), 1)), levels(views))


@each("factor", [0.1, 0.7, 1.3, 1.49, 2.2])
def test_sharpness_by_a_factor_that_is_no_binary_fraction_is_a_level_off_at_most(factor: float) -> None:
    """What torchvision cuts off may be a whole level but for the last bit, where a pixel is its neighbors' mean."""
    patches = some_patches(9 * 24, 8)
    changed = cut(applied(put(patches, 3), draws_of(24, 9, sharpness=factor), 8), 8)
    off = (changed - tv.adjust_sharpness(patches, factor)).abs()
    assert off.max() < 1.001 and (off > 1e-3).float().mean() < 0.3
    kept = put(patches[:, :, :1, :1].expand(-1, -1, 8, 8), 3)  # ours stays as it is; torchvision may lose a level
    assert torch.equal(levels(applied(kept, draws_of(24, 9, sharpness=factor), 8)), levels(kept))


def test_a_blur_mixes_columns_of_a_patch_and_not_its_rows() -> None:
    column = torch.zeros(3, 8, 8, dtype=torch.uint8)
    column[:, :, 3] = 200
    assert torch.equal(levels(applied(put(column[None], 1), draws_of(1, 1, blur=2.0), 8)), column[None].float())
    row = column.transpose(1, 2).contiguous()
    found = cut(applied(put(row[None], 1), draws_of(1, 1, blur=2.0), 8), 8)[0, 0, :, 0]
    weights = np.exp(-0.5 * (np.arange(-2, 3) / 2) ** 2)
    assert found.tolist() == pytest.approx([0, *(200 * weights / weights.sum()).round(), 0, 0], abs=1e-3)


@each("size", [4, 16])
def test_brightness_is_cut_off_before_and_after_the_hue(size: int) -> None:
    patches = some_patches(len(KINDS) * 8, size)[KINDS.index("bright")::len(KINDS)][:4]
    first, last = ([order for order in range(len(ORDERS)) if (ORDERS[order].index(0) < ORDERS[order].index(1)) is so]
                   for so in (True, False))
    for orders, expected in (
            (first, tv.adjust_hue(tv.adjust_brightness(patches, 1.6), 0.3)),
            (last, tv.adjust_brightness(tv.adjust_hue(patches, 0.3), 1.6))):
        for order in orders:
            changed = cut(applied(put(patches, 2), draws_of(1, 4, order, brightness=1.6, hue=0.3), size), size)
            assert (changed - expected.float()).abs().max() < 1.001
            assert ((changed - expected.float()).abs() > 1e-3).float().mean() < RARE
    assert len(first) == len(last) == 24


# orders

def every_order_and_choice(seed: int) -> PatchDraws:
    """6 views of 256 patches: each order with each choice of the five steps, at strengths drawn anew."""
    draws = wide_draws(6, 256, seed)
    choices = torch.tensor(list(itertools.product([False, True], repeat=5))).repeat(len(ORDERS), 1)
    strengths = torch.where(choices, draws.strengths.view(-1, 5), torch.tensor(NEUTRAL))
    order = torch.arange(len(ORDERS), dtype=torch.uint8).repeat_interleave(2**5)
    return PatchDraws(strengths.view(6, 256, 5), order.view(6, 256))


def test_the_orders_are_those_in_which_brightness_and_hue_are_neighbors() -> None:
    jittered = [[*order] for order in itertools.permutations(["jitter", "blur", "sharpness", "posterize"])]
    both = [[*order[:at], *jitter, *order[at + 1:]] for order in jittered for at in [order.index("jitter")]
            for jitter in (["brightness", "hue"], ["hue", "brightness"])]
    assert sorted(both) == sorted([STEPS[step] for step in order] for order in ORDERS)
    assert len(ORDERS) == 48


def by_hand(patch: Tensor, strengths: list[float], order: int) -> Tensor:
    for step in ORDERS[order]:
        if strengths[step] != NEUTRAL[step]:
            patch = ALONE[STEPS[step]][0](patch, strengths[step])
    return patch


def test_the_plain_form_takes_the_steps_of_the_order() -> None:
    draws, patches = every_order_and_choice(0), some_patches(6 * 256, 8)
    for patch, strengths, order in zip(patches, draws.strengths.view(-1, 5).tolist(), draws.order.flatten().tolist(),
                                       strict=True):
        assert torch.equal(change_patch(patch, strengths, order), by_hand(patch, strengths, order))


@pytest.mark.parametrize("size", SIZES)
def test_every_order_of_every_choice_of_steps_is_the_plain_form(size: int) -> None:
    draws, views = every_order_and_choice(size), put(some_patches(6 * 256, size, seed=1), 16)
    found, expected = cut(applied(views, draws, size), size), cut(plain(views, draws, size), size)
    off = (found - expected).abs().flatten(1)
    summed = (draws.strengths != torch.tensor(NEUTRAL)).view(-1, 5)[:, [STEPS.index("blur"), STEPS.index("hue")]].any(1)
    assert off[~summed].max() < 1e-3 and 4 * int(summed.sum()) == 3 * len(summed)
    assert (off > 1e-3).float().view(len(ORDERS), -1).mean(1).max() < RARE  # of each order


def swapped(order: tuple[int, ...], first: str, second: str) -> tuple[int, ...]:
    """The order with two names exchanged; "jitter" stands for brightness and hue, as they follow each other."""
    names = [STEPS[step] for step in order]
    jitter = [name for name in names if name in ("brightness", "hue")]
    if "jitter" in (first, second):
        names[names.index(jitter[0])] = "jitter"
        names.remove(jitter[1])
    one, other = names.index(first), names.index(second)
    names[one], names[other] = second, first
    return tuple(STEPS.index(step) for name in names for step in (jitter if name == "jitter" else [name]))


@each("first, second", [
    ("brightness", "hue"), *itertools.combinations(["jitter", "blur", "sharpness", "posterize"], 2)])
def test_a_wrong_order_is_far_outside_of_what_is_tolerated(first: str, second: str) -> None:
    wrong = torch.tensor([ORDERS.index(swapped(order, first, second)) for order in ORDERS], dtype=torch.uint8)
    right = torch.arange(48, dtype=torch.uint8)
    assert (wrong != right).all() and torch.equal(wrong[wrong.long()], right)
    draws, views = wide_draws(48, 4), put(some_patches(48 * 4, 8), 2)
    right, wrong = (order[:, None].expand(48, 4).contiguous() for order in (right, wrong))
    expected = plain(views, draws._replace(order=right), 8)
    assert differing(applied(views, draws._replace(order=right), 8), expected) < RARE
    assert differing(applied(views, draws._replace(order=wrong), 8), expected) > 20 * RARE


@each("step", STEPS)
def test_a_missing_step_is_far_outside_of_what_is_tolerated(step: str) -> None:
    draws, views = wide_draws(12, 16), put(some_patches(16 * 12, 8), 4)
    missing = draws.strengths.clone()
    missing[..., STEPS.index(step)] = NEUTRAL[STEPS.index(step)]
    expected = plain(views, draws, 8)
    assert differing(applied(views, draws, 8), expected) < RARE
    assert differing(applied(views, draws._replace(strengths=missing), 8), expected) > 20 * RARE


def test_a_blur_of_rows_is_far_outside_of_what_is_tolerated() -> None:
    draws, views = wide_draws(12, 16), put(some_patches(16 * 12, 8), 4)
    across = [PatchDraws(*(field.view(12, 4, 4, *field.shape[2:]).transpose(1, 2).reshape(field.shape)
                           for field in draws))]
    turned = views.transpose(2, 3).contiguous()
    apply_patches([turned], across, 8)  # all but the blur is the same for rows and columns
    assert differing(turned.transpose(2, 3), plain(views, draws, 8)) > 20 * RARE
    sharp = draws.strengths.clone()
    sharp[..., STEPS.index("blur")] = 0
    turned, across = views.transpose(2, 3).contiguous(), [across[0]._replace(strengths=sharp.view(
        12, 4, 4, 5).transpose(1, 2).reshape(12, 16, 5))]
    apply_patches([turned], across, 8)
    assert differing(turned.transpose(2, 3), plain(views, draws._replace(strengths=sharp), 8)) < RARE


@pytest.mark.parametrize("size", [4, 16])
def test_views_between_levels_are_rounded_first(size: int) -> None:
    draws, views = wide_draws(8, 9, size), torch.rand(8, 3, 3 * size, 3 * size,
                                                      generator=torch.Generator().manual_seed(size))
    assert differing(applied(views, draws, size), plain(views, draws, size)) < RARE
    rounded = draws_of(8, 9)
    assert differing(applied(views, rounded, size), (255 * views).round() / 255) < RARE  # halves, up or to even


# what a patch does not depend on

@each("size", [2, 7, 16])
def test_a_patch_does_not_depend_on_its_neighbors(size: int) -> None:
    draws, views = wide_draws(20, 9), put(some_patches(180, size), 3)
    others = 1 - views
    middle = slice(size, 2 * size)
    others[:, :, middle, middle] = views[:, :, middle, middle]
    changed, recolored = applied(views, draws, size), applied(others, draws, size)
    assert torch.equal(recolored[:, :, middle, middle], changed[:, :, middle, middle])
    assert not torch.equal(recolored, changed)


@each("size", [3, 16])
@each("most", [1, 9, 20, 10**9])
def test_a_view_does_not_depend_on_its_batch_nor_on_where_it_is_cut(
        size: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draws, views = wide_draws(12, 9), put(some_patches(9 * 12, size), 3)
    together = applied(views, draws, size)
    monkeypatch.setattr(patchcolor, "_CPU_PATCHES", most)
    assert torch.equal(applied(views, draws, size), together)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(applied(views[order], PatchDraws(*(field[order] for field in draws)), size), together[order])
    for view in range(12):
        alone = applied(views[view:view + 1], PatchDraws(*(field[view:view + 1] for field in draws)), size)
        assert torch.equal(alone, together[view:view + 1])


def test_views_of_several_sizes_are_changed_as_each_alone() -> None:
    sides = (3, 2, 1)
    draws = [wide_draws(4, side**2, side) for side in sides]
    views = [put(some_patches(4 * side**2, 8, side), side) for side in sides]
    changed = [view.clone() for view in views]
    assert apply_patches(changed, draws, 8) is None
    for found, view, drawn in zip(changed, views, draws, strict=True):
        assert torch.equal(found, applied(view, drawn, 8))


def test_scale_and_shift_are_a_normalization_afterwards() -> None:
    draws, views = wide_draws(6, 9), put(some_patches(54, 8), 3)
    scale, shift = [1 / (255 * s) for s in STD], [m / s for m, s in zip(MEAN, STD, strict=True)]
    expected = tv.normalize(plain(views, draws, 8), list(MEAN), list(STD))
    off = (applied(views, draws, 8, scale, shift) - expected).abs()
    assert (off > 1e-5).float().mean() < RARE
    assert (off - tv.normalize(applied(views, draws, 8), list(MEAN), list(STD)).sub(expected).abs()).abs().max() < 1e-5


def test_a_device_is_not_waited_for() -> None:
    draws = [wide_draws(4, 9), wide_draws(6, 4)]
    # a meta tensor has no values: whatever would wait for a device to read them fails on it
    views = [torch.empty(4, 3, 24, 24, device="meta"), torch.empty(6, 3, 16, 16, device="meta")]
    apply_patches(views, draws, 8)
    assert [view.shape for view in views] == [(4, 3, 24, 24), (6, 3, 16, 16)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each("size", [4, 14, 16])
def test_a_gpu_colors_as_the_plain_form(size: int) -> None:
    draws, views = every_order_and_choice(size), put(some_patches(6 * 256, size), 16)
    found, others = views.cuda(), put(some_patches(64, size), 4).cuda()
    apply_patches([found, others], [draws, wide_draws(4, 16)], size)
    assert differing(found.cpu(), plain(views, draws, size)) < RARE
    assert differing(others.cpu(), plain(put(some_patches(64, size), 4), wide_draws(4, 16), size)) < RARE


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 views of 4 x 4 patches need draws of shape"):
        apply_patches([torch.zeros(2, 3, 32, 32)], [draws_of(2, 4)], 8)
    with pytest.raises(ValueError, match="2 views of 4 x 4 patches"):
        apply_patches([torch.zeros(2, 3, 32, 32)], [draws_of(3, 16)], 8)
    with pytest.raises(ValueError, match="1 views of 2 x 2 patches"):
        apply_patches([torch.zeros(2, 3, 32, 32), torch.zeros(1, 3, 16, 16)], [draws_of(2, 16), draws_of(2, 4)], 8)
    with pytest.raises(ValueError, match="30 pixels"):
        apply_patches([torch.zeros(2, 3, 30, 30)], [draws_of(2, 9)], 8)
    with pytest.raises(ValueError):
        apply_patches([torch.zeros(2, 3, 32, 32)], [draws_of(2, 16)] * 2, 8)


# properties

@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 9999), size=st.sampled_from(SIZES), level=st.integers(0, 255))
def test_gray_stays_gray_and_constant_constant(seed: int, size: int, level: int) -> None:
    draws, patches = wide_draws(2, 4, seed), some_patches(8, size, seed)
    gray = applied(put(patches[:, :1].expand(-1, 3, -1, -1), 2), draws, size)
    assert torch.equal(gray, gray[:, :1].expand_as(gray))
    constant = cut(applied(put(patches[:, :, :1, :1].expand(-1, -1, size, size), 2), draws, size), size)
    assert torch.equal(constant, constant[:, :, :1, :1].expand_as(constant))
    even = cut(applied(torch.full((2, 3, 2 * size, 2 * size), level / 255), draws, size), size)
    assert torch.equal(even, even[:, :1, :1, :1].expand_as(even)) and even.min() >= 0 and even.max() < 255.001


def test_nothing_drawn_changes_nothing() -> None:
    views = put(some_patches(36, 8), 3)
    for order in range(len(ORDERS)):
        assert torch.equal(levels(applied(views, draws_of(4, 9, order), 8)), levels(views))
