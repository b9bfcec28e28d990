import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from cases import each
from torch import Tensor

from patchssl.views.color import (
    FIRST_GLOBAL,
    JITTERS,
    LOCAL,
    ORDERS,
    OTHER_GLOBAL,
    ColorDraws,
    apply_colors,
    draw_sample_colors,
    normalize,
    stack_draws,
)
from patchssl.views.config import PhotometricConfig
from patchssl.views.plaincolor import blur, color_view

TOLERANCE = 1e-5  # far inside the 1/255 that is asked for
ADJUST = {
    "brightness": tv.adjust_brightness, "contrast": tv.adjust_contrast,
    "saturation": tv.adjust_saturation, "hue": tv.adjust_hue,
}
WIDE = PhotometricConfig(patchwise="replace", patch_share=0.5, brightness=0.9, contrast=0.9, saturation=1.0, hue=0.5,
                         blur=(0.7, 0.7, 0.7), solarize=(0.4, 0.4, 0.4))


def sample_images(count: int, size: int, seed: int = 0) -> Tensor:
    """Noise, of which view 0 is gray, 1 black and white, 2 pure colors and ties, 3 smooth, as 8-bit levels / 255."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, size, size, generator=generator)
    images[0] = images[0, :1]
    if count > 3:
        images[1] = images[1, :1].round()
        images[2] = images[2].round()
        images[3] = torch.linspace(0, 1, size) * torch.tensor([1, 0.5, 0.2]).view(3, 1, 1)
    return (images * 255).round() / 255


def draws_of(count: int, patches: int, **fields: object) -> ColorDraws:
    """Draws that change nothing, but for `fields`, broadcast to their shape."""
    draws = ColorDraws(
        replaced=torch.zeros(count, dtype=torch.bool), sigma=torch.zeros(count),
        factors=torch.tensor([1.0, 1, 1, 0]).expand(count, patches, 4),
        order=torch.zeros(count, patches, dtype=torch.uint8),
        grayscale=torch.zeros(count, patches, dtype=torch.bool),
        solarize=torch.zeros(count, patches, dtype=torch.bool))
    return draws._replace(**{name: torch.as_tensor(value).expand(getattr(draws, name).shape).contiguous()
                             for name, value in fields.items()})


def jitter(image: Tensor, factors: Tensor, order: int) -> Tensor:
    for which in ORDERS[order]:
        image = ADJUST[JITTERS[which]](image, float(factors[which]))
    return image


def local_draws(seed: int, config: PhotometricConfig, count: int, patches: int) -> ColorDraws:
    """What training draws for the `count` local views of a sample."""
    return draw_sample_colors(np.random.default_rng(seed), config, 1, count, 1, patches)[1]


def of_view(draws: ColorDraws, view: int) -> ColorDraws:
    return ColorDraws(*(field[view] for field in draws))


def max_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


@each("replaced", [False, True])
@each("name, factor", [
    ("brightness", 0.4), ("brightness", 1.7), ("contrast", 0.3), ("contrast", 1.8), ("saturation", 0.0),
    ("saturation", 1.9), ("hue", -0.5), ("hue", -0.1), ("hue", 0.07), ("hue", 0.31), ("hue", 0.5)])
def test_each_jitter_is_torchvisions(name: str, factor: float, replaced: bool) -> None:
    images = sample_images(6, 16)
    factors = torch.tensor([1.0, 1, 1, 0])
    factors[JITTERS.index(name)] = factor
    draws = draws_of(6, 1, factors=factors, replaced=replaced)
    levels = (images * 255).round().byte()
    from_float, from_levels = apply_colors(images, draws, 16), apply_colors(levels, draws, 16)
    assert max_error(from_float, ADJUST[name](images[:, None], factor)[:, 0]) < TOLERANCE
    assert max_error(from_levels, from_float) < TOLERANCE
    # on 8-bit images torchvision cuts to whole levels, in between too: one level apart at most
    expected = torch.stack([ADJUST[name](view, factor) for view in levels])
    assert max_error((from_levels * 255 + 1e-3).floor(), expected.float()) <= 1


@pytest.mark.parametrize("replaced", [False, True])
def test_grayscale_and_solarize_are_torchvisions(replaced: bool) -> None:
    images = sample_images(6, 16)
    levels = (images * 255).round().byte()
    gray = draws_of(6, 1, replaced=replaced, grayscale=True)
    solar = draws_of(6, 1, replaced=replaced, solarize=True)
    assert max_error(apply_colors(images, gray, 16), tv.rgb_to_grayscale(images, 3)) < TOLERANCE
    assert max_error(apply_colors(images, solar, 16), tv.solarize(images, 0.5)) < TOLERANCE
    assert max_error((apply_colors(levels, gray, 16) * 255 + 1e-3).floor(),
                     tv.rgb_to_grayscale(levels, 3).float()) <= 1
    assert torch.equal((apply_colors(levels, solar, 16) * 255).round().byte(), tv.solarize(levels, 128))


@pytest.mark.parametrize("replaced", [False, True])
def test_every_order_of_the_jitters(replaced: bool) -> None:
    images = sample_images(24, 8)
    draws = draws_of(24, 1, replaced=replaced, factors=torch.tensor([1.3, 0.6, 1.5, 0.2]),
                     order=torch.arange(24, dtype=torch.uint8)[:, None])
    expected = torch.stack([jitter(image, draws.factors[i, 0], i) for i, image in enumerate(images)])
    assert max_error(apply_colors(images, draws, 8), expected) < TOLERANCE
    assert len(set(ORDERS)) == 24


@each("size", [4, 16, 40, 64, 96])
def test_blur_is_torchvisions_gaussian(size: int) -> None:
    images = sample_images(5, size)
    sigma = torch.tensor([0.0, 0.1, 0.7, 1.4, 2.0])
    for replaced in (False, True):
        colored = apply_colors(images, draws_of(5, 1, sigma=sigma, replaced=replaced), size)
        expected = torch.stack([blur(image, s) for image, s in zip(images, sigma, strict=True)])
        assert max_error(colored, expected) < TOLERANCE


@pytest.mark.parametrize("config", [WIDE, PhotometricConfig(patchwise="replace")], ids=["wide", "default"])
@pytest.mark.parametrize("size, patch_size, share", [
    (32, 8, 0.0), (32, 8, 1.0), (32, 4, 0.5), (30, 5, 0.5), (48, 16, 0.5), (96, 32, 0.5)])
def test_a_batch_equals_the_plain_form_view_by_view(size: int, patch_size: int, share: float,
                                                    config: PhotometricConfig) -> None:
    config = config.model_copy(update={"patch_share": share})
    per_side = size // patch_size
    rng = np.random.default_rng(size + patch_size)
    samples = [draw_sample_colors(rng, config, 2, 1, per_side**2, per_side**2) for _ in range(6)]
    globals_ = stack_draws([sample[0] for sample in samples]).flatten()
    images = sample_images(12, size)
    before = images.clone()
    colored = apply_colors(images, globals_, patch_size)
    for view, image in enumerate(images):
        assert max_error(colored[view], color_view(image, of_view(globals_, view), patch_size)) < 1e-4
    assert torch.equal(images, before)
    assert colored.min() >= 0 and colored.max() <= 1
    assert len(set(globals_.replaced.tolist())) == (2 if share == 0.5 else 1)


def test_a_view_does_not_depend_on_its_batch() -> None:
    draws = local_draws(5, WIDE, 8, 16)
    images = sample_images(8, 32)
    together = apply_colors(images, draws, 8)
    alone = [apply_colors(images[i : i + 1], ColorDraws(*(field[i : i + 1] for field in draws)), 8)
             for i in range(8)]
    assert max_error(together, torch.cat(alone)) < 1e-6


def test_after_the_blur_a_patch_does_not_depend_on_its_neighbors() -> None:
    draws = local_draws(1, WIDE.model_copy(update={"patch_share": 1.0}), 4, 16)
    images = sample_images(4, 32)
    blurred = torch.stack([blur(image, s) for image, s in zip(images, draws.sigma, strict=True)])
    sharp = draws._replace(sigma=torch.zeros(4))
    colored = apply_colors(blurred, sharp, 8)
    assert max_error(colored, apply_colors(images, draws, 8)) < 1e-4  # so that is all that follows the blur
    others = 1 - blurred
    others[:, :, 8:16, 16:24] = blurred[:, :, 8:16, 16:24]
    recolored = apply_colors(others, sharp, 8)
    assert torch.equal(recolored[:, :, 8:16, 16:24], colored[:, :, 8:16, 16:24])
    assert not torch.equal(recolored, colored)


def test_any_device_and_layout_without_waiting() -> None:
    draws = local_draws(2, WIDE, 6, 16)
    images = (sample_images(6, 32) * 255).byte()
    # a meta tensor has no values: whatever would wait for a device to read them fails on it
    nowhere = apply_colors(images.to("meta"), draws, 8)
    assert nowhere.shape == images.shape and nowhere.is_meta and nowhere.dtype == torch.float32
    colored = apply_colors(images, draws, 8)
    assert torch.equal(apply_colors(images.to(memory_format=torch.channels_last), draws, 8), colored)
    assert max_error(apply_colors(images.double() / 255, draws, 8), colored) < TOLERANCE
    assert apply_colors(images[:0], ColorDraws(*(field[:0] for field in draws)), 8).shape == (0, 3, 32, 32)


def test_gray_views_stay_gray_and_finite() -> None:
    draws = local_draws(3, WIDE, 8, 4)
    for level in (0.0, 0.5, 1.0):
        colored = apply_colors(torch.full((8, 3, 16, 16), level), draws, 8)
        assert colored.isfinite().all()
        assert max_error(colored, colored[:, :1].expand_as(colored)) < 1e-6


def test_nothing_drawn_changes_nothing() -> None:
    images = sample_images(4, 16)
    for replaced in (False, True):
        assert torch.equal(apply_colors(images, draws_of(4, 4, replaced=replaced), 8), images)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 views of 4 x 4 patches"):
        apply_colors(torch.zeros(2, 3, 32, 32), draws_of(2, 4), 8)
    with pytest.raises(ValueError, match="30 pixels"):
        apply_colors(torch.zeros(2, 3, 30, 30), draws_of(2, 9), 8)


def test_normalize_is_torchvisions() -> None:
    images, mean, std = sample_images(4, 8), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert max_error(normalize(images, mean, std), tv.normalize(images, list(mean), list(std))) < 1e-5


def test_draws_follow_from_the_generator() -> None:
    first, second, other = (draw_sample_colors(np.random.default_rng(seed), WIDE, 2, 3, 16, 4) for seed in (7, 7, 8))
    for a, b, c in zip(first, second, other, strict=True):
        assert all(map(torch.equal, a, b))
        assert not torch.equal(a.factors, c.factors)
    assert first[0].factors.shape == (2, 16, 4) and first[1].factors.shape == (3, 4, 4)
    assert first[1].sigma.shape == (3,) and first[1].order.shape == (3, 4)
    empty = draw_sample_colors(np.random.default_rng(0), WIDE, 2, 0, 16, 4)[1]
    assert stack_draws([empty, empty]).flatten().solarize.shape == (0, 4)


def test_patch_share_decides_nothing_else() -> None:
    shares = [WIDE.model_copy(update={"patch_share": share}) for share in (0.0, 0.3, 1.0)]
    none, some, every = (local_draws(4, config, 40, 9) for config in shares)
    assert not none.replaced.any() and every.replaced.all() and 0 < some.replaced.sum() < 20
    assert torch.equal(none.sigma, every.sigma) and torch.equal(some.sigma, every.sigma)
    for kept, whole, mixed in zip(every[2:], none[2:], some[2:], strict=True):
        first = kept[:, :1].expand_as(kept)
        assert torch.equal(whole, first)  # a whole view has what its first patch would have
        assert torch.equal(mixed[some.replaced], kept[some.replaced])
        assert torch.equal(mixed[~some.replaced], first[~some.replaced])


def test_settings_leave_each_others_draws_alone() -> None:
    def drawn(**update: object) -> ColorDraws:
        rng = np.random.default_rng(9)
        config = WIDE.model_copy(update={"patch_share": 1.0, **update})
        draws = draw_sample_colors(rng, config, 1, 2, 1, 200)[1]
        states.append(rng.bit_generator.state)
        return draws

    states: list[object] = []
    base = drawn()
    less = drawn(jitter=0.5, grayscale=0.1, blur=(0.1, 0.1, 0.1), solarize=(0, 0, 0))
    jittered = less.factors[..., 0] != 1
    assert 0.4 < jittered.float().mean() < 0.6
    assert torch.equal(less.factors[jittered], base.factors[jittered]) and torch.equal(less.order, base.order)
    assert not (less.grayscale & ~base.grayscale).any()
    narrow = drawn(hue=0.1)
    assert torch.equal(narrow.factors[..., :3], base.factors[..., :3])
    assert torch.allclose(narrow.factors[..., 3] * 5, base.factors[..., 3], atol=1e-5)
    assert all(state == states[0] for state in states)


def test_draws_have_the_recipes_probabilities_and_ranges() -> None:
    config = PhotometricConfig(patchwise="replace", patch_share=0.3)
    rng = np.random.default_rng(0)
    globals_, locals_ = (stack_draws(views) for views in zip(
        *(draw_sample_colors(rng, config, 2, 1, 4, 4) for _ in range(3000)), strict=True))
    kinds = {kind: ColorDraws(*(field[:, view] for field in draws)) for kind, draws, view in (
        (FIRST_GLOBAL, globals_, 0), (OTHER_GLOBAL, globals_, 1), (LOCAL, locals_, 0))}
    for kind, draws in kinds.items():
        blurred = draws.sigma > 0
        assert draws.replaced.float().mean() == pytest.approx(0.3, abs=0.04)
        assert blurred.float().mean() == pytest.approx(config.blur[kind], abs=0.04)
        assert draws.solarize.float().mean() == pytest.approx(config.solarize[kind], abs=0.04)
        assert draws.grayscale.float().mean() == pytest.approx(0.2, abs=0.04)
        assert 0.1 <= draws.sigma[blurred].min() < 0.2 and 1.9 < draws.sigma.max() <= 2.0
    factors = kinds[LOCAL].factors[kinds[LOCAL].replaced].flatten(0, 1)
    jittered = (factors != torch.tensor([1.0, 1, 1, 0])).any(1)
    assert jittered.float().mean() == pytest.approx(0.8, abs=0.04)
    for column, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        drawn, width = factors[jittered][:, column], high - low
        assert low - 1e-6 <= drawn.min() < low + 0.03 * width and high - 0.03 * width < drawn.max() <= high + 1e-6
        assert drawn.mean() == pytest.approx((low + high) / 2, abs=0.03 * width)
    orders = torch.bincount(kinds[FIRST_GLOBAL].order.flatten().long(), minlength=24)
    assert len(orders) == 24 and orders.min() > 0.6 * orders.float().mean()


def test_whole_views_hold_one_draw_and_patch_wise_views_many() -> None:
    draws = local_draws(6, PhotometricConfig(patchwise="replace", patch_share=0.5), 20, 16)
    alike = (draws.factors == draws.factors[:, :1]).all(-1).all(-1)
    assert torch.equal(alike, ~draws.replaced) and 0 < alike.sum() < 20


def test_stacked_draws_keep_the_order_of_samples_and_views() -> None:
    rng = np.random.default_rng(8)
    samples = [draw_sample_colors(rng, WIDE, 2, 0, 4, 4)[0] for _ in range(3)]
    stacked = stack_draws(samples)
    assert stacked.factors.shape == (3, 2, 4, 4) and stacked.flatten().factors.shape == (6, 4, 4)
    assert torch.equal(stacked.flatten().order[5], samples[2].order[1])
    assert torch.equal(stacked.to("cpu").sigma[1], samples[1].sigma)
