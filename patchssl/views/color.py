"""Color augmentation: drawn per sample on the CPU, applied to all views of a batch at once, on any device.

Read `patchssl.views.plaincolor` first: it says the same of one view in torchvision's words. Whole views follow DINO:
color jitter, grayscale, Gaussian blur, solarization; the mild changes of `layered` patch-wise color come after that,
in `patchssl.views.patchcolor`. Views whose color is replaced patch by patch (`replace`) are blurred first, then
jitter, grayscale and solarization are drawn anew for every patch of the ViT's own grid. A whole view is colored as
one patch as large as the view, so both kinds share one implementation. Draws stay on the CPU: which patches need what
is decided there, so that a device is never waited for.

In order: what is drawn (`ColorDraws`, `draw_sample_colors`), what is done with it (`apply_colors`), and how.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from patchssl.views.config import PhotometricConfig
from patchssl.views.geometry import patches_per_side
from patchssl.views.patchcolor import PatchDraws, apply_patches, send

JITTERS = ("brightness", "contrast", "saturation", "hue")
ORDERS = tuple(itertools.permutations(range(4)))  # `ColorDraws.order` is a row of this: indices into JITTERS
FIRST_GLOBAL, OTHER_GLOBAL, LOCAL = range(3)  # kinds of views, as the triples of PhotometricConfig
BLUR_REACH = 3.0  # the Gaussian is cut off at this many standard deviations, rounded up to pixels

_NO_JITTER = np.array([1, 1, 1, 0], np.float32)
_HUE_PLACE = np.array([order.index(3) for order in ORDERS], np.int8)
_BLENDS = np.array([[jitter for jitter in order if jitter != 3] for order in ORDERS], np.int8)
_GRAY = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green, blue
_DRAWS_PER_VIEW, _DRAWS_PER_PATCH = 3, 8


class ColorDraws(NamedTuple):
    """What was drawn for views of P patches, on the CPU; `...` is any batch shape.

    Of a whole view all P entries are alike. Leave the draws on the CPU: `apply_colors` decides there which
    patches need what and sends the device the rest; for draws on a device it has to wait.
    """

    replaced: Tensor  # (...) bool: colored patch by patch instead of as a whole
    sigma: Tensor  # (...) float32: standard deviation of the blur in pixels, 0 = none
    factors: Tensor  # (..., P, 4) float32 in the order of JITTERS: 1, 1, 1, 0 change nothing, hue in turns
    order: Tensor  # (..., P) uint8: row of ORDERS, in which the four are applied
    grayscale: Tensor  # (..., P) bool
    solarize: Tensor  # (..., P) bool

    def flatten(self) -> ColorDraws:
        """The first two batch dimensions as one: draws of (B, V) views as draws of B * V views."""
        return ColorDraws(*(field.flatten(0, 1) for field in self))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ColorDraws:
        """The draws on `device`."""
        return ColorDraws(*(field.to(device, non_blocking=non_blocking) for field in self))


AnyDraws = TypeVar("AnyDraws", ColorDraws, PatchDraws)


def draw_sample_colors(
    rng: np.random.Generator, config: PhotometricConfig, num_global: int, num_local: int,
    global_patches: int, local_patches: int,
) -> tuple[ColorDraws, ColorDraws]:
    """Draws for the G global views of a sample, batch shape (G,), and for its L local ones, (L,).

    A view takes the same count of random numbers whatever comes out, so a changed probability or range
    changes what it names and nothing else.
    """
    kinds = [FIRST_GLOBAL] + [OTHER_GLOBAL] * (num_global - 1) + [LOCAL] * num_local
    # drawn together, as if all views had as many patches: half the time of two calls
    drawn = _draw(rng, config, kinds, max(global_patches, local_patches))
    of_global = [field[:num_global, :global_patches] if field.ndim > 1 else field[:num_global] for field in drawn]
    of_local = [field[num_global:, :local_patches] if field.ndim > 1 else field[num_global:] for field in drawn]
    return ColorDraws(*map(torch.from_numpy, of_global)), ColorDraws(*map(torch.from_numpy, of_local))


def stack_draws(samples: Sequence[AnyDraws]) -> AnyDraws:
    """Draws of B samples, batch shape (V,) each, as draws of batch shape (B, V)."""
    return type(samples[0])(*map(torch.stack, zip(*samples, strict=True)))


def _draw(
    rng: np.random.Generator, config: PhotometricConfig, kinds: Sequence[int], num_patches: int,
) -> tuple[NDArray[np.generic], ...]:
    """The fields of `ColorDraws` for views of `kinds`."""
    share, blur, radius = rng.random((_DRAWS_PER_VIEW, len(kinds)), dtype=np.float32)
    draws = rng.random((_DRAWS_PER_PATCH, len(kinds), num_patches), dtype=np.float32)
    replaced = (share < config.patch_share) & (config.patchwise == "replace")
    for view in np.flatnonzero(~replaced):
        draws[:, view] = draws[:, view, :1]  # one draw for the whole view
    jitter, order, grayscale, solarize = draws[4:]
    low, span = _factor_ranges(config)
    factors = draws[:4].transpose(1, 2, 0) * span + low
    factors[jitter >= config.jitter] = _NO_JITTER
    smallest, largest = config.blur_radius
    blurred = blur < np.array([config.blur[kind] for kind in kinds])
    solarized = solarize < np.array([config.solarize[kind] for kind in kinds])[:, None]
    sigma = np.where(blurred, smallest + radius * (largest - smallest), 0).astype(np.float32)
    order = (order * len(ORDERS)).astype(np.uint8)
    return replaced, sigma, factors, order, grayscale < config.grayscale, solarized


def _factor_ranges(config: PhotometricConfig) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Low ends and widths of the ranges of the four factors."""
    wide = (config.brightness, config.contrast, config.saturation)
    low = [*(max(0.0, 1 - value) for value in wide), -config.hue]
    high = [*(1 + value for value in wide), config.hue]
    return np.array(low, np.float32), np.subtract(high, low, dtype=np.float32)


@torch.no_grad()
def apply_colors(images: Tensor, draws: ColorDraws, patch_size: int) -> Tensor:
    """Colored views (M, 3, S, S) float32 in [0, 1], from `images` (M, 3, S, S): uint8, or float in [0, 1].

    `draws` are those of the M views, (S / patch_size)^2 patches each, on the CPU; `images` may lie on any
    device, which is not waited for. Raises ValueError when sizes do not fit each other.
    """
    per_side = patches_per_side(images.shape[-1], patch_size)
    if draws.order.shape != (len(images), per_side**2):
        raise ValueError(f"{len(images)} views of {per_side} x {per_side} patches need draws of shape "
                         f"({len(images)}, {per_side**2}), these are {tuple(draws.order.shape)}")
    draws = draws.to("cpu")
    kinds = []
    if len(replaced := draws.replaced.nonzero()[:, 0]):
        kinds.append(_color_patches(images, replaced, draws, patch_size))
    if len(whole := (~draws.replaced).nonzero()[:, 0]):
        kinds.append(_color_whole(images, whole, draws))
    if not kinds:
        return images.float()
    colored = torch.cat([part for part, _ in kinds]) if len(kinds) > 1 else kinds[0][0]
    return colored.index_select(0, send(torch.cat([views for _, views in kinds]).argsort(), images.device))


@torch.no_grad()
def layer_colors(images: Sequence[Tensor], draws: Sequence[ColorDraws], patches: Sequence[PatchDraws], patch_size: int,
                 mean: Sequence[float], std: Sequence[float]) -> list[Tensor]:
    """Views of several sizes colored as wholes, then patch by patch, and normalized: `images` as `apply_colors` has.

    Patches of all sizes are changed together, and normalized by the way.
    """
    colored = [apply_colors(some, drawn, patch_size) if len(some) else some.float()
               for some, drawn in zip(images, draws, strict=True)]
    some = [(views, drawn) for views, drawn in zip(colored, patches, strict=True) if len(views)]
    scale, shift = [1 / (255 * s) for s in std], [m / s for m, s in zip(mean, std, strict=True)]
    apply_patches([views for views, _ in some], [drawn for _, drawn in some], patch_size, scale, shift)
    return colored


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """`images` (..., 3, H, W) with `mean` taken off and divided by `std`, per channel."""
    scale = 1 / torch.tensor(std, dtype=images.dtype).view(-1, 1, 1)
    shift = torch.tensor(mean, dtype=images.dtype).view(-1, 1, 1) * scale
    return (images * send(scale, images.device)).sub_(send(shift, images.device))


def _color_patches(
    images: Tensor, views: Tensor, draws: ColorDraws, patch_size: int,
) -> tuple[Tensor, Tensor]:
    """Patch-wise `views` (M,) colored, and which they are: blur, then all else patch by patch."""
    per_side = images.shape[-1] // patch_size
    blurred = _blur(_float(images, views), draws.sigma[views])
    plan = _plan(draws.factors[views].flatten(0, 1), draws.order[views].flatten(),
                 draws.grayscale[views].flatten(), draws.solarize[views].flatten())
    # memory holds, for each row of pixels, one piece per patch: gather them patch by patch as planned, and back
    pieces = torch.arange(blurred.numel() // patch_size, device=images.device)
    there = pieces.view(len(views), 3, per_side, patch_size, per_side).permute(1, 0, 2, 4, 3)
    there = there.reshape(3, -1, patch_size).index_select(1, send(plan.sorting, images.device))
    back = pieces.view(3, -1, patch_size).index_select(1, send(plan.sorting.argsort(), images.device))
    back = back.view(3, len(views), per_side, per_side, patch_size).permute(1, 0, 2, 4, 3)
    rows = blurred.view(-1, patch_size).index_select(0, there.flatten()).view(3, -1, patch_size**2)
    coefficients = send(plan.coefficients, images.device)
    _jitter_(rows, plan, coefficients)
    _grayscale_(rows, plan, coefficients)
    _solarize_(rows, plan, coefficients)
    return rows.view(-1, patch_size).index_select(0, back.flatten()).view(blurred.shape), views


def _color_whole(images: Tensor, views: Tensor, draws: ColorDraws) -> tuple[Tensor, Tensor]:
    """Whole `views` (M,) colored, in the order of the second result: jitter, grayscale, blur, solarization."""
    plan = _plan(draws.factors[views, 0], draws.order[views, 0], draws.grayscale[views, 0],
                 draws.solarize[views, 0])
    views = views[plan.sorting]
    colored, coefficients = _float(images, views), send(plan.coefficients, images.device)
    rows = colored.flatten(2).transpose(0, 1)
    _jitter_(rows, plan, coefficients)
    _grayscale_(rows, plan, coefficients)
    colored = _blur(colored, draws.sigma[views])
    _solarize_(colored.flatten(2).transpose(0, 1), plan, coefficients)
    return colored, views


class _PatchPlan(NamedTuple):
    """The order in which N patches are worked on, and what is done to each.

    Sorted by the place of hue in their order, the latest first, and those without jitter last: then each blend
    before hue works on a prefix, hue on all that are jittered, each blend after it on the others.
    """

    sorting: Tensor  # (N,) int64: which patch comes next
    num_before: tuple[int, ...]  # for each of the three blends: how many patches it meets before hue
    num_jittered: int
    any_gray: bool
    any_solar: bool
    coefficients: Tensor  # (12, N, 1) float32: factor, to_mean, to_gray of each blend, hue, grayscale, solarize


def _plan(factors: Tensor, order: Tensor, grayscale: Tensor, solarize: Tensor) -> _PatchPlan:
    """The plan for N patches from what was drawn for them, all on the CPU."""
    place = np.where((factors.numpy() != _NO_JITTER).any(-1), _HUE_PLACE[order.numpy()], -1)
    sorting = np.argsort(-place, kind="stable")
    drawn = factors.numpy()[sorting].T
    blends = _BLENDS.T[:, order.numpy()[sorting]]  # (3, N) indices into JITTERS
    coefficients = np.empty((12, len(sorting), 1), np.float32)
    coefficients[0:9:3, :, 0] = np.choose(blends, drawn[:3])
    coefficients[1:9:3, :, 0] = blends == JITTERS.index("contrast")
    coefficients[2:9:3, :, 0] = blends == JITTERS.index("saturation")
    coefficients[9, :, 0] = drawn[3]
    coefficients[10, :, 0] = grayscale.numpy()[sorting]
    coefficients[11, :, 0] = solarize.numpy()[sorting]
    num_jittered, *num_before = np.count_nonzero(place > np.arange(-1, 3)[:, None], axis=1).tolist()
    return _PatchPlan(torch.from_numpy(sorting), tuple(num_before), num_jittered, bool(grayscale.any()),
                      bool(solarize.any()), torch.from_numpy(coefficients))


def _jitter_(rows: Tensor, plan: _PatchPlan, coefficients: Tensor) -> None:
    """Brightness, contrast, saturation and hue of `rows` (3, N, pixels), each patch in its own order."""
    steps, end = coefficients[:9].view(3, 3, -1, 1), plan.num_jittered
    for step, num in zip(steps, plan.num_before, strict=True):
        _blend_(rows[:, :num], *step[:, :num])
    _shift_hue_(rows[:, :end], coefficients[9, :end])
    for step, num in zip(steps, plan.num_before, strict=True):
        _blend_(rows[:, num:end], *step[:, num:end])


def _blend_(rows: Tensor, factor: Tensor, to_mean: Tensor, to_gray: Tensor) -> None:
    """Blend `rows` (3, N, pixels) with black (brightness), mean gray (contrast) or their gray (saturation).

    The three are (N, 1): how much stays, then 1 where the other part is the mean gray, 1 where it is the gray.
    """
    if rows.shape[1]:
        other = _gray(rows)
        mean = other.mean(-1, keepdim=True) * to_mean
        torch.lerp(other.mul_(to_gray).add_(mean), rows, factor, out=rows).clamp_(0, 1)


def _shift_hue_(rows: Tensor, turns: Tensor) -> None:
    """Turn the hue of `rows` (3, N, pixels) by `turns` (N, 1), saturation and value in HSV kept.

    With the channels scaled to [0, 1] by their own range, the hue is 1 + green + blue - red sixths of a turn
    from red, towards green or towards blue.
    """
    red, green, blue = rows
    low = torch.minimum(torch.minimum(red, green), blue)
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - low
    hue = (green + blue).sub_(red).sub_(low).div_(chroma.clamp(min=1e-12)).add_(1)
    hue = torch.copysign(hue, green - blue).add_(turns * 6 - 3)
    hue.sub_((hue / 6).round_(), alpha=6)  # sixths of a turn from cyan, -3 to 3
    torch.addcmul(low, chroma, hue.abs().sub_(1).clamp_(0, 1), out=red)
    torch.addcmul(high, chroma, (hue + 1).abs_().sub_(1).clamp_(0, 1), value=-1, out=green)
    torch.addcmul(high, chroma, hue.sub_(1).abs_().sub_(1).clamp_(0, 1), value=-1, out=blue)


def _grayscale_(rows: Tensor, plan: _PatchPlan, coefficients: Tensor) -> None:
    """Replace the patches of `rows` (3, N, pixels) that were drawn for it by their gray."""
    if plan.any_gray:
        torch.lerp(rows, _gray(rows), coefficients[10], out=rows)


def _solarize_(rows: Tensor, plan: _PatchPlan, coefficients: Tensor) -> None:
    """Invert the bright half of the values of the patches of `rows` (3, N, pixels) that were drawn for it."""
    if plan.any_solar:  # the smaller of x and 1 - x; of x and x where it was not drawn
        torch.minimum(rows, (rows - coefficients[11]).abs_(), out=rows)


def _gray(rows: Tensor) -> Tensor:
    """Gray (N, pixels) of `rows` (3, N, pixels)."""
    red, green, blue = _GRAY
    return (rows[0] * red).add_(rows[1], alpha=green).add_(rows[2], alpha=blue)


def _blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of `images` (M, 3, S, S) by `sigma` (M,) pixels, 0 = none, on the CPU; edges reflect.

    Each block of rows, then of columns, is the product of a band matrix with the pixels that it can see.
    """
    chosen, size = sigma.nonzero()[:, 0], images.shape[-1]
    if not len(chosen):
        return images
    views = send(chosen, images.device)
    sharp = images if len(chosen) == len(images) else images.index_select(0, views)
    block = math.gcd(size, 32)
    bands = _blur_bands(sigma[chosen].numpy(), size, block if block >= 8 else size)
    bands = send(bands, images.device)  # (M, block, window)
    _, block, window = bands.shape
    padded = F.pad(sharp, ((window - block) // 2,) * 4, mode="reflect")
    rows = bands[:, None, None] @ padded.unfold(2, window, block).mT  # (M, 3, S / block, block, S + padding)
    columns = rows.reshape(len(chosen), -1, padded.shape[-1]).unfold(2, window, block).flatten(1, 2)
    blurred = (columns @ bands.mT).view(sharp.shape)
    return blurred if sharp is images else images.index_copy_(0, views, blurred)


def _blur_bands(sigma: NDArray[np.float32], size: int, block: int) -> Tensor:
    """Matrices (M, block, block + 2 reach) whose row i is the Gaussian of `sigma` (M,) around i + reach."""
    limits = np.minimum(np.ceil(BLUR_REACH * sigma), size - 1)[:, None]  # a view's own, whatever the batch's
    reach = int(limits.max())
    lag = np.arange(-reach, reach + 1, dtype=np.float32)
    kernel = np.exp(-0.5 * (lag / sigma[:, None]) ** 2) * (np.abs(lag) <= limits)
    padded = np.zeros((len(sigma), 2 * (reach + block) - 1), np.float32)
    padded[:, block - 1 : -block + 1 or None] = kernel / kernel.sum(1, keepdims=True)
    return torch.from_numpy(padded).unfold(1, block + 2 * reach, 1).flip(1)


def _float(images: Tensor, views: Tensor) -> Tensor:
    """The `views` of `images` as a contiguous float32 copy in [0, 1]."""
    taken = images.index_select(0, send(views, images.device)).contiguous()
    return taken.float().div_(255) if images.dtype == torch.uint8 else taken.float()
