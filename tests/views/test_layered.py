"""What is drawn for layered patch-wise color, and how it lies over the color of whole views."""

import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from cases import each
from scipy.stats import chisquare, kstest

from patchssl.views.color import apply_colors, draw_sample_colors, layer_colors, normalize, stack_draws
from patchssl.views.config import PatchColorConfig, PhotometricConfig
from patchssl.views.patchcolor import NEUTRAL, ORDERS, STEPS, PatchDraws, draw_patches
from patchssl.views.plaincolor import color_view

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NONE = PhotometricConfig(patchwise="none")
STILL = {"jitter": 0.0, "blur": 0.0, "sharpen": 0.0, "posterize": 0.0}
ALL = {"jitter": 1.0, "blur": 1.0, "sharpen": 1.0, "posterize": 1.0}
BRIGHTNESS, HUE, BLUR, SHARPNESS, POSTERIZE = range(5)


def config(share: float = 1.0, **patch: object) -> PhotometricConfig:
    return PhotometricConfig(patch_share=share, patch=PatchColorConfig(**patch))


def drawn(seed: int, settings: PhotometricConfig, num_global: int = 2, num_local: int = 3) -> tuple[PatchDraws, ...]:
    """Draws for views of 16 and of 4 patches."""
    return draw_patches(np.random.default_rng(seed), settings, num_global, num_local, 16, 4)


def many(settings: PhotometricConfig, count: int = 40_000) -> PatchDraws:
    """The draws of so many patches, one view each."""
    return PatchDraws(*(field[:, 0] for field in draw_patches(np.random.default_rng(5), settings, count, 0, 1, 0)[0]))


def taken(draws: PatchDraws) -> torch.Tensor:
    """(..., 5) bool: which strengths are not neutral."""
    return draws.strengths != torch.tensor(NEUTRAL)


# what is drawn

def test_the_strengths_are_in_the_order_of_the_names() -> None:
    assert [STEPS[step] for step in range(5)] == ["brightness", "hue", "blur", "sharpness", "posterize"]
    assert NEUTRAL == (1, 0, 0, 1, 8)


def test_draws_follow_from_the_generator_and_fit_the_views() -> None:
    first, second, other = (drawn(seed, config()) for seed in (7, 7, 8))
    for one, again, changed in zip(first, second, other, strict=True):
        assert all(map(torch.equal, one, again))
        assert not torch.equal(one.strengths, changed.strengths) and not torch.equal(one.order, changed.order)
    assert first[0].strengths.shape == (2, 16, 5) and first[1].strengths.shape == (3, 4, 5)
    assert first[0].order.shape == (2, 16) and first[1].order.shape == (3, 4)
    assert {field.dtype for field in first[0]} == {torch.float32, torch.uint8}
    none = drawn(0, config(), num_local=0)[1]
    assert none.strengths.shape == (0, 4, 5)
    stacked = stack_draws([none, none])
    assert isinstance(stacked, PatchDraws) and stacked.flatten().order.shape == (0, 4)
    batch = stack_draws([one[0] for one in (first, second, other)])
    assert torch.equal(batch.flatten().strengths[5], other[0].strengths[1])


def test_no_two_patches_are_alike() -> None:
    views = [view for seed in range(20) for part in drawn(seed, config(**ALL)) for view in part.strengths]
    patches = torch.cat(views)
    assert len(patches) == 20 * (2 * 16 + 3 * 4)
    for column in (BRIGHTNESS, HUE, BLUR):
        assert len(patches[:, column].unique()) > 0.99 * len(patches)
    assert len(torch.unique(patches, dim=0)) == len(patches)


def test_patches_views_images_and_settings_are_drawn_independently() -> None:
    """No correlation of any two columns: of 5 random numbers and the order of 12 patches of 3 views."""
    samples = [draw_patches(np.random.default_rng([3, seed]), config(), 2, 1, 4, 4) for seed in range(3000)]
    strengths = torch.stack([torch.cat([part.strengths for part in sample]) for sample in samples])
    orders = torch.stack([torch.cat([part.order for part in sample]) for sample in samples])
    columns = torch.cat([strengths, orders[..., None]], -1).flatten(1).T.double()
    assert columns.shape == (3 * 4 * 6, 3000)
    found = torch.corrcoef(columns) - torch.eye(len(columns))
    assert found.abs().max() < 5 / 3000**0.5
    following = torch.stack([torch.corrcoef(torch.stack([row[:-1], row[1:]]))[0, 1] for row in columns])  # next image
    assert following.abs().max() < 5 / 3000**0.5


def test_what_happens_to_a_patch_is_drawn_independently_too() -> None:
    draws = many(config(jitter=0.5, blur=0.5))
    columns = torch.cat([taken(draws)[:, 1:], draws.strengths[:, :3], draws.order[:, None]], 1).T.double()
    happens = torch.corrcoef(columns)[:4]
    apart = torch.ones(4, 8, dtype=torch.bool)
    for step, column in ((0, 0), (1, 1), (2, 2), (3, 3), (1, 6)):  # itself, and the blur's own strength
        apart[step, column] = False
    assert happens[apart].abs().max() < 5 / draws.order.numel()**0.5


def test_orders_are_uniform_and_so_is_each_step_among_its_places() -> None:
    counts = torch.bincount(many(config()).order.long(), minlength=48)
    assert len(counts) == 48 and chisquare(counts.numpy()).pvalue > 1e-3
    blur = torch.tensor([order.index(BLUR) for order in ORDERS])
    assert torch.bincount(blur).tolist() == [12, 8, 8, 8, 12]  # after a jitter one place later


def test_each_setting_has_its_probability_and_its_range() -> None:
    settings = config(jitter=0.7, brightness=0.3, hue=0.2, blur=0.6, blur_radius=(0.5, 1.5), sharpen=0.4, sharpness=3,
                      posterize=0.2, posterize_bits=5)
    draws = many(settings)
    for step, share in enumerate((0.7, 0.7, 0.6, 0.4, 0.2)):
        assert taken(draws)[:, step].float().mean() == pytest.approx(share, abs=0.012), STEPS[step]
    assert torch.equal(taken(draws)[:, BRIGHTNESS], taken(draws)[:, HUE])  # one jitter
    for step, low, width in ((BRIGHTNESS, 0.7, 0.6), (HUE, -0.2, 0.4), (BLUR, 0.5, 1.0)):
        values = draws.strengths[taken(draws)[:, step], step].double().numpy()
        assert low - 1e-6 <= values.min() and values.max() <= low + width + 1e-6
        assert kstest(values, "uniform", (low, width)).pvalue > 1e-3, STEPS[step]
    assert draws.strengths[:, SHARPNESS].unique().tolist() == [1, 3]
    assert draws.strengths[:, POSTERIZE].unique().tolist() == [5, 8]


def test_the_defaults_are_the_authors() -> None:
    """ColorJitter(0.1, hue=0.1), GaussianBlur((1, 5), (0.1, 2)), sharpness 2 and 3 bits with probability 1/2."""
    draws = many(PhotometricConfig())
    assert taken(draws)[:, [BRIGHTNESS, HUE]].float().mean() > 0.999 and taken(draws)[:, BLUR].all()
    for step, low, high in ((BRIGHTNESS, 0.9, 1.1), (HUE, -0.1, 0.1), (BLUR, 0.1, 2.0)):
        values = draws.strengths[:, step]
        assert values.min() == pytest.approx(low, abs=1e-3) and values.max() == pytest.approx(high, abs=1e-3)
    for step, value in ((SHARPNESS, 2), (POSTERIZE, 3)):
        assert draws.strengths[:, step].unique().tolist() == sorted({value, NEUTRAL[step]})
        assert taken(draws)[:, step].float().mean() == pytest.approx(0.5, abs=0.012)


@each("name", ["jitter", "blur", "sharpen", "posterize"])
def test_probabilities_of_zero_and_one(name: str) -> None:
    steps = {"jitter": [BRIGHTNESS, HUE], "blur": [BLUR], "sharpen": [SHARPNESS], "posterize": [POSTERIZE]}[name]
    others = [step for step in range(5) if step not in steps]
    never, only = taken(many(config(**{**ALL, name: 0.0}))), taken(many(config(**{**STILL, name: 1.0})))
    assert not never[:, steps].any() and never[:, others].float().mean() > 0.999
    assert not only[:, others].any() and only[:, steps].float().mean() > 0.999


def test_a_factor_is_never_negative() -> None:
    assert many(config(brightness=3.0)).strengths[:, BRIGHTNESS].min() >= 0


@each("change", [{"jitter": 0.5}, {"blur": 0.3}, {"sharpen": 0.1}, {"posterize": 0.1}, {"hue": 0.5},
                 {"blur_radius": (0.1, 4.0)}, {"sharpness": 3.0}, {"posterize_bits": 2}, {"brightness": 0.4}])
def test_a_setting_changes_what_it_names_and_nothing_else(change: dict[str, object]) -> None:
    name = next(iter(change))
    steps = {"jitter": [BRIGHTNESS, HUE], "blur": [BLUR], "sharpen": [SHARPNESS], "posterize": [POSTERIZE],
             "hue": [HUE], "blur_radius": [BLUR], "sharpness": [SHARPNESS], "posterize_bits": [POSTERIZE],
             "brightness": [BRIGHTNESS]}[name]
    base, changed = many(config(**ALL)), many(config(**{**ALL, **change}))
    others = [step for step in range(5) if step not in steps]
    assert torch.equal(changed.order, base.order)
    assert torch.equal(changed.strengths[:, others], base.strengths[:, others])
    assert not torch.equal(changed.strengths[:, steps], base.strengths[:, steps])
    if name in STILL:  # a smaller probability leaves some patches alone, and the others as they were
        left = changed.strengths[:, steps] == torch.tensor(NEUTRAL)[steps]
        assert torch.equal(changed.strengths[:, steps][~left], base.strengths[:, steps][~left])


@each("share", [0.0, 0.3, 1.0])
def test_the_share_of_views_decides_nothing_else(share: float) -> None:
    every, some = (drawn(3, config(chosen, **ALL), 500, 500) for chosen in (1.0, share))
    left_alone = []
    for all_, part in zip(every, some, strict=True):
        assert torch.equal(part.order, all_.order)
        touched = taken(part).flatten(1).any(1)
        assert torch.equal(part.strengths[touched], all_.strengths[touched])  # a view as a whole, or not at all
        left_alone.append(1 - touched.float().mean())
    assert left_alone == pytest.approx([1 - share] * 2, abs=0.07)
    assert share not in (0.0, 1.0) or left_alone == [1 - share] * 2


@each("patchwise", ["layered", "none"])
def test_whole_view_color_is_drawn_as_without_patch_wise_color(patchwise: str) -> None:
    settings = PhotometricConfig(patchwise=patchwise, patch_share=0.4)
    rng, other = np.random.default_rng(1), np.random.default_rng(1)
    for found, expected in zip(draw_sample_colors(rng, settings, 2, 3, 16, 4),
                               draw_sample_colors(other, NONE, 2, 3, 16, 4), strict=True):
        assert all(map(torch.equal, found, expected)) and not found.replaced.any()
    assert rng.bit_generator.state == other.bit_generator.state


# over the color of whole views

def batch(settings: PhotometricConfig, count: int = 6) -> tuple[list, list, list]:
    """(Images, draws of color, draws of patches) of global views of 32 and local ones of 16 pixels, patches of 8."""
    rng = np.random.default_rng(2)
    colors = [draw_sample_colors(rng, settings, 2, 3, 16, 4) for _ in range(count)]
    patches = [draw_patches(rng, settings, 2, 3, 16, 4) for _ in range(count)]
    images = [torch.from_numpy(rng.integers(0, 256, (count * views, 3, size, size), dtype=np.uint8))
              for views, size in ((2, 32), (3, 16))]
    return (images, *([stack_draws(part).flatten() for part in zip(*some, strict=True)] for some in (colors, patches)))


def test_views_are_colored_as_wholes_then_patch_by_patch_then_normalized() -> None:
    images, colors, patches = batch(config(0.7))
    found = layer_colors(images, colors, patches, 8, MEAN, STD)
    for views, *fields, changed in zip(images, colors, patches, found, strict=True):
        expected = torch.stack([
            color_view(view / 255, *(type(draws)(*(field[number] for field in draws)) for draws in fields[:1]), 8,
                       PatchDraws(*(field[number] for field in fields[1]))) for number, view in enumerate(views)])
        off = (changed - tv.normalize(expected, list(MEAN), list(STD))).abs()
        # a value on the edge of a level may fall to the other side, where posterization makes more of it
        assert (off > 1e-4).float().mean() < 2e-3, float((off > 1e-4).float().mean())


def test_without_any_change_of_patches_whole_views_are_rounded_and_no_more() -> None:
    images, colors, patches = batch(config(**STILL))
    found = layer_colors(images, colors, patches, 8, MEAN, STD)
    for views, drawn_, changed in zip(images, colors, found, strict=True):
        whole = normalize(apply_colors(views, drawn_, 8), MEAN, STD)
        off = (changed - whole).abs() * torch.tensor(STD).view(3, 1, 1)
        assert off.max() <= 1 / 510 + 1e-5 and off.max() > 1e-3


@each("local_size", [16, 17])
def test_there_may_be_no_local_views(local_size: int) -> None:
    images, colors, patches = batch(config())
    expected = layer_colors(images[:1], colors[:1], patches[:1], 8, MEAN, STD)[0]
    none = [torch.empty(0, 3, local_size, local_size, dtype=torch.uint8), *(type(some[1])(
        *(field[:0] for field in some[1])) for some in (colors, patches))]
    found = layer_colors([images[0], none[0]], [colors[0], none[1]], [patches[0], none[2]], 8, MEAN, STD)
    assert torch.equal(found[0], expected) and found[1].shape == (0, 3, local_size, local_size)


def test_draws_that_do_not_fit_the_views_are_refused() -> None:
    images, colors, patches = batch(config())
    for wrong in ([patches[1], patches[1]], [patches[0], patches[0]]):
        with pytest.raises(ValueError, match="need draws of shape"):
            layer_colors(images, colors, wrong, 8, MEAN, STD)


def test_a_whole_batch_says_the_same_as_its_parts() -> None:
    images, colors, patches = batch(config())
    found = layer_colors(images, colors, patches, 8, MEAN, STD)
    for begin, end in itertools.pairwise((0, 2, 6)):
        parts = [slice(views * begin, views * end) for views in (2, 3)]
        some = layer_colors([x[part] for x, part in zip(images, parts, strict=True)],
                            *([type(d)(*(field[part] for field in d)) for d, part in zip(draws, parts, strict=True)]
                              for draws in (colors, patches)), 8, MEAN, STD)
        assert all((a - b[part]).abs().max() < 1e-5 or (a != b[part]).float().mean() < 2e-3
                   for a, b, part in zip(some, found, parts, strict=True))
