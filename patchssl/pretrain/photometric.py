"""Color augmentation: drawn per sample on the CPU, applied to all views of a batch at once, wherever they lie.

Whole views follow DINO: color jitter, grayscale, Gaussian blur, solarization. Patch-wise views are blurred
first, then jitter, grayscale and solarization are drawn anew for every patch of the ViT's own grid. A whole view
is colored as one patch as large as the view, so both kinds share one implementation, and every operation equals
torchvision's functional one. Draws stay on the CPU: which patches need what is decided there, so that a device
is never waited for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from patchssl.geometry import patches_per_side
from patchssl.pretrain.config import PhotometricConfig

JITTERS = ("brightness", "contrast", "saturation", "hue")
ORDERS = tuple(itertools.permutations(range(4)))  # `ColorDraws.order` is a row of this: indices into JITTERS
FIRST_GLOBAL, OTHER_GLOBAL, LOCAL = range(3)  # kinds of views, as the triples of PhotometricConfig
BLUR_REACH = 3  # the Gaussian is cut off at this many standard deviations, rounded up to pixels
SOLARIZE_FROM = 0.5  # 128 of 255 is the first level above it, PIL's and torchvision's threshold

_HUE_AT = tuple(order.index(3) for order in ORDERS)
_BLENDS = tuple(tuple(op for op in order if op != 3) for order in ORDERS)
_GRAY = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green, blue
_DRAWS_PER_VIEW, _DRAWS_PER_PATCH = 3, 8


class ColorDraws(NamedTuple):
    """What was drawn for views of P patches, on the CPU; `...` is any batch shape.

    Of a whole view all P entries are alike. Leave the draws on the CPU: `apply_colors` decides there which
    patches need what and sends the device the rest; for draws on a device it has to wait.
    """

    patchwise: Tensor  # (...) bool: colored patch by patch
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


def draw_sample_colors(
    rng: np.random.Generator, config: PhotometricConfig, num_global: int, num_local: int,
    global_patches: int, local_patches: int,
) -> tuple[ColorDraws, ColorDraws]:
    """Draws for the G global views of a sample, batch shape (G,), and for its L local ones, (L,).

    A view takes the same count of random numbers whatever comes out, so a changed probability or range changes
    what it names and nothing else.
    """
    kinds = [FIRST_GLOBAL] + [OTHER_GLOBAL] * (num_global - 1)
    return (draw_colors(rng, config, kinds, global_patches),
            draw_colors(rng, config, [LOCAL] * num_local, local_patches))


def draw_colors(
    rng: np.random.Generator, config: PhotometricConfig, kinds: Sequence[int], num_patches: int,
) -> ColorDraws:
    """Draws for views of P = `num_patches` patches; `kinds`: FIRST_GLOBAL, OTHER_GLOBAL or LOCAL for each."""
    share, blur, radius = rng.random((_DRAWS_PER_VIEW, len(kinds)), dtype=np.float32)
    draws = rng.random((_DRAWS_PER_PATCH, len(kinds), num_patches), dtype=np.float32)
    patchwise = share < config.patch_share
    for view in np.flatnonzero(~patchwise):
        draws[:, view] = draws[:, view, :1]  # one draw for the whole view
    jitter, order, grayscale, solarize = draws[4:]
    low, span = _factor_ranges(config)
    factors = draws[:4].transpose(1, 2, 0) * span + low
    factors[jitter >= config.jitter] = (1, 1, 1, 0)
    smallest, largest = config.blur_radius
    blurred = blur < np.array([config.blur[kind] for kind in kinds])
    solarized = solarize < np.array([config.solarize[kind] for kind in kinds])[:, None]
    sigma = np.where(blurred, smallest + radius * (largest - smallest), 0).astype(np.float32)
    fields = (patchwise, sigma, factors, (order * len(ORDERS)).astype(np.uint8), grayscale < config.grayscale,
              solarized)
    return ColorDraws(*map(torch.from_numpy, fields))


def stack_draws(samples: Sequence[ColorDraws]) -> ColorDraws:
    """Draws of B samples, batch shape (V,) each, as draws of batch shape (B, V)."""
    return ColorDraws(*map(torch.stack, zip(*samples, strict=True)))


def _factor_ranges(config: PhotometricConfig) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Low ends and widths of the ranges of the four factors."""
    wide = (config.brightness, config.contrast, config.saturation)
    low = [*(max(0.0, 1 - value) for value in wide), -config.hue]
    high = [*(1 + value for value in wide), config.hue]
    return np.array(low, np.float32), np.subtract(high, low, dtype=np.float32)


@torch.no_grad()
def apply_colors(images: Tensor, draws: ColorDraws, patch_size: int) -> Tensor:
    """Colored views (M, 3, S, S) float32 in [0, 1], from `images` (M, 3, S, S): uint8, or float in [0, 1].

    `draws` are those of the M views, (S / patch_size)^2 patches each, on the CPU; `images` may lie on any device,
    which is not waited for. Raises ValueError when sizes do not fit each other.
    """
    per_side = patches_per_side(images.shape[-1], patch_size)
    if draws.order.shape != (len(images), per_side**2):
        raise ValueError(f"{len(images)} views of {per_side} x {per_side} patches need draws of shape "
                         f"({len(images)}, {per_side**2}), these are {tuple(draws.order.shape)}")
    draws = draws.to("cpu")
    out = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    patchwise = np.flatnonzero(draws.patchwise.numpy())
    whole = np.flatnonzero(~draws.patchwise.numpy())
    if len(patchwise):
        _put(out, patchwise, _color_patches(_fresh_float(_take(images, patchwise)), draws, patchwise, patch_size))
    if len(whole):
        _put(out, whole, _color_whole(_fresh_float(_take(images, whole)), draws, whole))
    return out


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """`images` (..., 3, H, W) with `mean` taken off and divided by `std`, per channel."""
    scale = torch.tensor(std, dtype=images.dtype).reciprocal().view(-1, 1, 1)
    shift = torch.tensor(mean, dtype=images.dtype).view(-1, 1, 1) * scale
    return torch.addcmul(-_send(shift, images), images, _send(scale, images))


def _color_patches(images: Tensor, draws: ColorDraws, views: NDArray[np.int64], patch_size: int) -> Tensor:
    """Patch-wise views (M, 3, S, S): blur, then jitter, grayscale and solarization patch by patch."""
    images = _blur(images, draws.sigma[views])
    per_side = images.shape[-1] // patch_size
    grid = images.unflatten(3, (per_side, patch_size)).unflatten(2, (per_side, patch_size))
    rows = grid.permute(1, 0, 2, 4, 3, 5).reshape(3, -1, patch_size**2)
    rows = _jitter(rows, draws.factors[views].flatten(0, 1), draws.order[views].flatten())
    _grayscale_(rows, draws.grayscale[views].flatten())
    _solarize_(rows, draws.solarize[views].flatten())
    grid = rows.view(3, len(images), per_side, per_side, patch_size, patch_size)
    return grid.permute(1, 0, 2, 4, 3, 5).reshape(images.shape)


def _color_whole(images: Tensor, draws: ColorDraws, views: NDArray[np.int64]) -> Tensor:
    """Whole views (M, 3, S, S): jitter, grayscale, blur, solarization, each view as one patch."""
    rows = _jitter(images.flatten(2).transpose(0, 1), draws.factors[views, 0], draws.order[views, 0])
    _grayscale_(rows, draws.grayscale[views, 0])
    images = _blur(rows.transpose(0, 1).reshape(images.shape), draws.sigma[views])
    _solarize_(images.flatten(2).transpose(0, 1), draws.solarize[views, 0])
    return images


def _jitter(rows: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue of N patches, `rows` (3, N, pixels), each in its own order.

    Patches are sorted by the place of hue in their order, the latest first, and those without jitter last: then
    each blend before hue works on a prefix, hue on all that are jittered, each blend after it on the others.
    """
    place = np.where((factors.numpy() != (1, 1, 1, 0)).any(-1), np.array(_HUE_AT)[order.numpy()], -1)
    sorting = torch.from_numpy(np.argsort(-place.astype(np.int8), kind="stable"))
    num_before = [int((place > blend).sum()) for blend in range(3)]
    num_jittered = int((place >= 0).sum())
    if not num_jittered:
        return rows.contiguous()
    blends = torch.tensor(_BLENDS)[order[sorting].long()]  # (N, 3)
    factors = factors[sorting]
    steps = torch.stack([factors.gather(1, blends), blends == 1, blends == 2]).permute(2, 0, 1).unsqueeze(-1)
    steps = _send(steps, rows)  # (3 blends, 3, N, 1)
    rows = rows.index_select(1, _send(sorting, rows))
    for step, end in zip(steps, num_before, strict=True):
        _blend_(rows[:, :end], *step[:, :end])
    _shift_hue_(rows[:, :num_jittered], _send(factors[:num_jittered, 3:], rows))
    for step, start in zip(steps, num_before, strict=True):
        _blend_(rows[:, start:num_jittered], *step[:, start:num_jittered])
    return rows.index_select(1, _send(sorting.argsort(), rows))


def _blend_(rows: Tensor, factor: Tensor, to_mean: Tensor, to_gray: Tensor) -> None:
    """Blend `rows` (3, N, pixels) with black (brightness), mean gray (contrast) or their gray (saturation).

    The three are (N, 1): how much stays, then 1 where the other part is the mean gray, 1 where it is the gray.
    """
    gray = _gray(rows)
    other = torch.addcmul(gray.mean(-1, keepdim=True) * to_mean, gray, to_gray)
    torch.lerp(other, rows, factor, out=rows).clamp_(0, 1)


def _shift_hue_(rows: Tensor, turns: Tensor) -> None:
    """Turn the hue of `rows` (3, N, pixels) by `turns` (N, 1), saturation and value in HSV kept."""
    red, green, blue = rows
    high, low = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    sextant = torch.where(high == green, torch.add(blue - red, chroma, alpha=2),
                          torch.add(red - green, chroma, alpha=4))
    sextant = torch.where(high == red, green - blue, sextant).div_(chroma.clamp(min=1e-12))
    sextant.add_(turns * 6 - 3)
    sextant.sub_((sextant / 6).round_(), alpha=6)  # sixths of a turn from cyan, -3 to 3
    torch.addcmul(low, chroma, sextant.abs().sub_(1).clamp_(0, 1), out=red)
    torch.addcmul(low, chroma, (sextant + 1).abs_().neg_().add_(2).clamp_(0, 1), out=green)
    torch.addcmul(low, chroma, (sextant - 1).abs_().neg_().add_(2).clamp_(0, 1), out=blue)


def _grayscale_(rows: Tensor, flags: Tensor) -> None:
    """Replace the patches of `rows` (3, N, pixels) that are flagged, (N,) on the CPU, by their gray."""
    if flags.any():
        chosen = _send(flags.nonzero().squeeze(1), rows)
        rows.index_copy_(1, chosen, _gray(rows.index_select(1, chosen)).expand(3, -1, -1))


def _solarize_(rows: Tensor, flags: Tensor) -> None:
    """Invert the bright values of the patches of `rows` (3, N, pixels) that are flagged, (N,) on the CPU."""
    if flags.any():
        chosen = _send(flags.nonzero().squeeze(1), rows)
        picked = rows.index_select(1, chosen)
        rows.index_copy_(1, chosen, torch.where(picked < SOLARIZE_FROM, picked, 1 - picked))


def _gray(rows: Tensor) -> Tensor:
    """Gray (N, pixels) of `rows` (3, N, pixels)."""
    red, green, blue = _GRAY
    return (rows[0] * red).add_(rows[1], alpha=green).add_(rows[2], alpha=blue)


def _blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of `images` (M, 3, S, S) by `sigma` (M,) pixels, 0 = none, on the CPU; edges reflect."""
    views = np.flatnonzero(sigma.numpy())
    if not len(views):
        return images
    sharp, size = _take(images, views), images.shape[-1]
    reach = min(math.ceil(BLUR_REACH * float(sigma.max())), size - 1)
    block = math.gcd(size, 32)
    block = block if block >= 8 else size
    bands = _send(_blur_bands(sigma[views], reach, block), images)  # (M, block, block + 2 reach)
    blurred = F.pad(sharp, (reach,) * 4, mode="reflect")
    # each block of rows, then of columns, is a product with the pixels that it can see
    blurred = bands[:, None, None] @ blurred.unfold(2, bands.shape[-1], block).mT
    blurred = blurred.reshape(len(views), -1, size + 2 * reach).unfold(2, bands.shape[-1], block)
    blurred = (blurred.flatten(1, 2) @ bands.mT).view(sharp.shape)
    return _put(images, views, blurred) if len(views) < len(images) else blurred


def _blur_bands(sigma: Tensor, reach: int, block: int) -> Tensor:
    """Matrices (M, block, block + 2 reach) whose row i is the Gaussian of `sigma` (M,) around i + reach."""
    lag = torch.arange(-reach, reach + 1)
    kernel = torch.exp(-0.5 * (lag / sigma[:, None]) ** 2)
    kernel *= lag.abs() <= torch.ceil(BLUR_REACH * sigma[:, None])  # a view's own reach
    padded = F.pad(kernel / kernel.sum(1, keepdim=True), (0, block)).repeat(1, block)
    return padded[:, : block * (block + 2 * reach)].view(len(sigma), block, -1)


def _fresh_float(images: Tensor) -> Tensor:
    """A float32 copy in [0, 1], which what follows may overwrite."""
    if images.dtype == torch.uint8:
        return images.float().div_(255)
    return images.to(torch.float32, copy=True)


def _send(values: Tensor, images: Tensor) -> Tensor:
    """`values` from the CPU to where `images` lie, without waiting."""
    return values.pin_memory().to(images.device, non_blocking=True) if images.is_cuda else values


def _take(images: Tensor, views: NDArray[np.int64]) -> Tensor:
    if len(views) == len(images):
        return images
    return images.index_select(0, _send(torch.from_numpy(views), images))


def _put(images: Tensor, views: NDArray[np.int64], colored: Tensor) -> Tensor:
    return images.index_copy_(0, _send(torch.from_numpy(views), images), colored)
