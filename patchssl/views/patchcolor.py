"""Layered patch-wise color: mild changes drawn anew for each patch of views that are colored already, all at once.

Read `patchssl.views.plaincolor.change_patch` first: it says the same of one patch in torchvision's words. The
operations and their strengths are those of PW-Self's authors (PatchAugmentation in alijavidani/dino, branch
imagenet100-patch_augmentation, 26acb86): each patch is jittered (brightness and hue), blurred upwards and downwards,
sharpened and posterized in an order of its own, on 8-bit values.

In order: what is drawn (`PatchDraws`, `draw_patches`), what is done with it (`apply_patches`), and how. Blur and
sharpening come before the jitter, after it or not at all; `_PASSES` is the shortest series of passes in which every
order finds its place, and patches are sorted so that each pass meets neighbors only. Posterization needs no pass: it
is a coarser step of the rounding that ends the pass before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchssl.views.config import PhotometricConfig
from patchssl.views.geometry import patches_per_side

STEPS = ("brightness", "hue", "blur", "sharpness", "posterize")
NEUTRAL = (1.0, 0.0, 0.0, 1.0, 8.0)  # strengths that change nothing
# `PatchDraws.order` is a row of this: indices into STEPS. Brightness and hue, one jitter, are never parted
ORDERS = tuple(order for order in itertools.permutations(range(5)) if abs(order.index(0) - order.index(1)) == 1)
BLUR_REACH = 2  # pixels up and down

_BRIGHTNESS, _HUE, _BLUR, _SHARPNESS, _POSTERIZE = range(5)
_START = _END = 5  # in `_units`
_DRAWS_PER_PATCH = 8
_NEUTRAL = np.array(NEUTRAL, np.float32)
_FROM_RED = np.array([0, -2, 2], np.float32)  # sixths of a turn from a channel's own hue to red's
_TO_BYTE = 255.999 / 255  # torchvision's: a value in [0, 1] becomes a byte by x 255.999, cut off
_CPU_PATCHES = 512  # worked on at once on a CPU: what stays in its cache


class PatchDraws(NamedTuple):
    """What was drawn for views of P patches, on the CPU; `...` is any batch shape."""

    strengths: Tensor  # (..., P, 5) float32 in the order of STEPS: factor, turns, sigma in pixels, factor, bits
    order: Tensor  # (..., P) uint8: row of ORDERS, in which the five are applied

    def flatten(self) -> PatchDraws:
        """The first two batch dimensions as one: draws of (B, V) views as draws of B * V views."""
        return PatchDraws(*(field.flatten(0, 1) for field in self))


def draw_patches(rng: np.random.Generator, config: PhotometricConfig, num_global: int, num_local: int,
                 global_patches: int, local_patches: int) -> tuple[PatchDraws, PatchDraws]:
    """Draws for the G global views of a sample, batch shape (G,), and for its L local ones, (L,).

    A view and a patch take the same count of random numbers whatever comes out.
    """
    left_alone = rng.random(num_global + num_local, dtype=np.float32) >= config.patch_share
    shapes = (num_global, global_patches), (num_local, local_patches)
    border = num_global * global_patches
    strengths, order = _draw(rng, config, border + num_local * local_patches)
    strengths[np.repeat(left_alone, [global_patches] * num_global + [local_patches] * num_local)] = NEUTRAL
    of_global, of_local = (PatchDraws(torch.from_numpy(strengths[some].reshape(*shape, 5)),
                                      torch.from_numpy(order[some].reshape(shape)))
                           for some, shape in zip((slice(border), slice(border, None)), shapes, strict=True))
    return of_global, of_local


def _draw(rng: np.random.Generator, config: PhotometricConfig, num: int,
          ) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Strengths (num, 5) and orders (num,) of so many patches."""
    patch = config.patch
    draws = rng.random((_DRAWS_PER_PATCH, num), dtype=np.float32)
    strengths = np.tile(_NEUTRAL, (num, 1))
    ranges = {_BRIGHTNESS: (max(0.0, 1 - patch.brightness), 1 + patch.brightness), _HUE: (-patch.hue, patch.hue),
              _BLUR: patch.blur_radius}
    for chance, probability, steps in ((0, patch.jitter, (_BRIGHTNESS, _HUE)), (1, patch.blur, (_BLUR,))):
        happens = draws[chance] < probability
        for step in steps:
            low, high = ranges[step]
            strengths[happens, step] = (low + (high - low) * draws[2 + step])[happens]
    strengths[draws[5] < patch.sharpen, _SHARPNESS] = patch.sharpness
    strengths[draws[6] < patch.posterize, _POSTERIZE] = patch.posterize_bits
    return strengths, (draws[7] * len(ORDERS)).astype(np.uint8)


# Kinds of orders, by where blur B and sharpening S are beside the jitter J, in the sequence that patches are sorted by
_KINDS = ("BJS", "JS", "JSB", "JBS", "JB", "SJB", "SJ", "BSJ", "SBJ", "BJ", "J")
# Passes in this order of time: what is done, and the first and the last of the kinds that it is done to
_PASSES = (("B", "BSJ", "BSJ"), ("S", "SJB", "SBJ"), ("B", "SBJ", "BJ"), ("B", "BJS", "BJS"), ("J", "BJS", "J"),
           ("B", "JBS", "SJB"), ("S", "BJS", "JBS"), ("B", "JSB", "JSB"))


class _Plan(NamedTuple):
    """The order in which N patches are worked on, and the numbers of each.

    Between two operations values are 8-bit values, or after posterization whole steps of its 2^(8 - bits): `in` is
    that step for the operation that meets it and 1 for all others, `out` 1 / step for the one that leaves it, else 1.
    """

    rows: Tensor  # (2, N) int64: which patch comes next, and where each patch has gone
    starts: tuple[int, ...]  # where each of _KINDS begins, and the end
    start: Tensor  # (2, N, 1, 1, 1): 255 x out, and out / 2
    jitter: Tensor  # (3, N, 1, 1, 1): brightness before hue x in, brightness after it x out, 255 x out
    hue: Tensor  # (N, 3, 1): sixths of a turn from each channel's own hue to the one that red's becomes
    blur: Tensor  # (4, N, 3), the same for each channel: weights at 0, 1, 2 pixels x in x out, then out / 2
    sharpen: Tensor  # (3, N, 1, 1, 1): in, factor, out
    end: Tensor  # (N, 3, 1, 1): in x the scale of what is returned

    def to(self, device: torch.device) -> _Plan:
        """The plan on `device`, copied without waiting: all numbers at once."""
        if device.type == "cpu":
            return self
        parts = [self.start, self.jitter, self.hue, self.blur, self.sharpen, self.end]
        sent = send(torch.cat([part.flatten() for part in parts]), device).split([part.numel() for part in parts])
        start, jitter, hue, blur, sharpen, end = (flat.view(part.shape) for flat, part in zip(sent, parts, strict=True))
        return _Plan(send(self.rows, device), self.starts, start, jitter, hue, blur, sharpen, end)


@torch.no_grad()
def apply_patches(views: Sequence[Tensor], draws: Sequence[PatchDraws], patch_size: int,
                  scale: Sequence[float] = (1 / 255,) * 3, shift: Sequence[float] = (0.0,) * 3) -> None:
    """Change each patch of views of one or more sizes, in place: to 8-bit values x `scale` - `shift` per channel.

    `views` are (M, 3, S, S) float32 in [0, 1], contiguous, on any device, which is not waited for; `draws` are theirs,
    on the CPU. Raises ValueError when sizes do not fit each other.
    """
    for view, drawn in zip(views, draws, strict=True):
        per_side = patches_per_side(view.shape[-1], patch_size)
        if drawn.order.shape != (len(view), per_side**2):
            raise ValueError(f"{len(view)} views of {per_side} x {per_side} patches need draws of shape "
                             f"({len(view)}, {per_side**2}), these are {tuple(drawn.order.shape)}")
    fixed = send(torch.cat([_matrices(patch_size).flatten(), torch.tensor(shift)]), views[0].device)
    matrices, lowered = fixed[:-3].view(6, patch_size, patch_size), fixed[-3:].view(3, 1, 1)
    portions = list(_portions(views, draws))
    most = max(len(drawn.order) for _, drawn in portions)
    room = views[0].new_empty(4, most, 3, patch_size, patch_size)  # once: new memory is slow
    for some, drawn in portions:
        grids = [view.unflatten(2, (-1, patch_size)).unflatten(4, (-1, patch_size)).permute(0, 2, 4, 1, 3, 5)
                 for view in some]  # (M, side, side, 3, p, p)
        own = room[:, :len(drawn.order)]
        parts = [part.view(grid.shape) for grid, part in
                 zip(grids, own[0].split([grid.shape[:3].numel() for grid in grids]), strict=True)]
        for grid, part in zip(grids, parts, strict=True):
            part.copy_(grid)
        _change(own, _plan(drawn, scale, patch_size).to(room.device), matrices, lowered)
        for grid, part in zip(grids, parts, strict=True):
            grid.copy_(part)


def _portions(views: Sequence[Tensor], draws: Sequence[PatchDraws]) -> Iterator[tuple[list[Tensor], PatchDraws]]:
    """What is worked on at once, with the draws of all its patches: on a device everything, on a CPU a cacheful."""
    if views[0].device.type != "cpu":
        yield list(views), PatchDraws(*(torch.cat([field.flatten(0, 1) for field in fields])
                                        for fields in zip(*draws, strict=True)))
        return
    for view, drawn in zip(views, draws, strict=True):
        count = max(1, _CPU_PATCHES // drawn.order.shape[1])
        for part, *fields in zip(view.split(count), *(field.split(count) for field in drawn), strict=True):
            yield [part], PatchDraws(*(field.flatten(0, 1) for field in fields))


def _matrices(size: int) -> Tensor:
    """(6, size, size): what blur and sharpening of patches of `size` pixels a side multiply by.

    Three sum each pixel's neighbors at 0, 1 and 2 pixels, edges reflect; the next sums those at 0 and 1 pixel, but for
    the outermost pixels, and the next is a 13th of it; the last weighs pixels in their own mean, 1 for the outermost.
    """
    matrices, pixels = torch.zeros(6, size, size), torch.arange(size)
    for reach in range(1 + min(BLUR_REACH, size - 1)):
        for neighbor in {-reach, reach}:
            seen = (pixels + neighbor).abs()
            matrices[reach, pixels, torch.minimum(seen, 2 * (size - 1) - seen)] += 1
    inside = slice(1, size - 1)
    matrices[3, inside] = torch.ones(size, size).tril(1).triu(-1)[inside]
    matrices[4], matrices[5], matrices[5, inside, inside] = matrices[3] / 13, 1, 4 / 13
    return matrices


def _plan(draws: PatchDraws, scale: Sequence[float], size: int) -> _Plan:
    """The plan for N patches of `size` pixels a side from their draws, of batch shape ()."""
    strengths, order = draws.strengths.numpy(), draws.order.numpy()
    blurred, sharpened = strengths[:, _BLUR] != 0, strengths[:, _SHARPNESS] != 1
    if size < 3:  # torchvision leaves them as they are
        sharpened = np.zeros_like(sharpened)
    routes = _ROUTES[order, blurred.astype(np.intp), sharpened.astype(np.intp)]
    sorting = np.argsort(routes[:, 0], kind="stable")
    kinds, leaves, meets, first = routes[sorting].T
    factor, turns, sigma, sharpness, bits = strengths[sorting].T
    step, every = np.exp2(8 - bits), np.arange(len(order))  # 1 for patches that are not posterized
    ins, outs = np.ones((2, 6, len(order)), np.float32)
    ins[meets, every], outs[leaves, every] = step, 1 / step
    hue = 6 * turns[:, None] + _FROM_RED
    hue -= 6 * np.round(hue / 6)
    numbers = {
        "start": np.stack([255 * outs[_START], outs[_START] / 2]),
        "jitter": np.stack([np.where(first, factor, 1) * ins[_HUE], np.where(first, 1, factor) * outs[_HUE],
                            255 * outs[_HUE]]),
        "hue": hue,
        "blur": np.concatenate([_weights(sigma, size) * (ins[_BLUR] * outs[_BLUR]), outs[_BLUR, None] / 2]),
        "sharpen": np.stack([ins[_SHARPNESS], sharpness, outs[_SHARPNESS]]),
        "end": ins[_END, :, None] * np.array(scale, np.float32)}
    start, jitter, turned, blur, sharpen, end = map(torch.from_numpy, numbers.values())
    pixels = (..., None, None, None)
    rows = torch.from_numpy(np.stack([sorting, np.argsort(sorting)]))
    return _Plan(rows, tuple(np.searchsorted(kinds, np.arange(len(_KINDS) + 1)).tolist()), start[pixels],
                 jitter[pixels], turned[..., None], blur[..., None].repeat(1, 1, 3), sharpen[pixels],
                 end[..., None, None])


def _routes() -> NDArray[np.intp]:
    """(48, 2, 2, 4): for each of ORDERS, whether blurred and whether sharpened, what `_plan` asks of a patch.

    Its index into _KINDS; what posterization follows, and what follows it: one of STEPS that is taken (_HUE for the
    jitter), or _START and _END; whether brightness comes before hue.
    """
    routes = np.empty((len(ORDERS), 2, 2, 4), np.intp)
    for row, blurred, sharpened in np.ndindex(routes.shape[:3]):
        order = ORDERS[row]
        taken = {_HUE: "J"} | ({_BLUR: "B"} if blurred else {}) | ({_SHARPNESS: "S"} if sharpened else {})
        steps = [_START, *(step for step in order if step in taken or step == _POSTERIZE), _END]
        place = steps.index(_POSTERIZE)
        kind = _KINDS.index("".join(taken[step] for step in order if step in taken))
        routes[row, blurred, sharpened] = (kind, steps[place - 1], steps[place + 1],
                                           order.index(_BRIGHTNESS) < order.index(_HUE))
    return routes


def _weights(sigma: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """(3, N): the Gaussian of `sigma` (N,) at 0, 1 and 2 pixels, as far as a patch of `size` pixels reflects."""
    lag = np.arange(3, dtype=np.float32)[:, None]
    kernel = np.exp(-0.5 * (lag / np.where(sigma > 0, sigma, 1)) ** 2) * (lag <= min(BLUR_REACH, size - 1))
    return (kernel / (kernel[0] + 2 * kernel[1:].sum(0))).astype(np.float32)


def _change(room: Tensor, plan: _Plan, matrices: Tensor, lowered: Tensor) -> None:
    """Change the patches room[0] (N, 3, p, p) in [0, 1] as planned, to 8-bit values that are scaled and `lowered`.

    `room` (4, N, 3, p, p) has, beside them, room to work in.
    """
    spare, patches, blurs, more = room
    torch.index_select(spare, 0, plan.rows[0], out=patches).mul_(plan.start[0]).add_(plan.start[1]).floor_()
    torch.mm(plan.blur[:3].flatten(1).T, matrices[:3].flatten(1), out=blurs.flatten(0, 1).flatten(1))
    for name, first, last in _PASSES:
        some = slice(plan.starts[_KINDS.index(first)], plan.starts[_KINDS.index(last) + 1])
        if some.start == some.stop:
            continue
        if name == "B":
            _blur_(patches[some], blurs[some], plan.blur[3, some], spare[some])
        elif name == "S":
            _sharpen_(patches[some], plan.sharpen[:, some], matrices[3:], spare[some], more[some])
        else:
            _jitter_(patches, plan.jitter, plan.hue, [*spare.view(3, len(spare), -1), *more.view(3, len(more), -1)])
    torch.index_select(patches.mul_(plan.end).sub_(lowered), 0, plan.rows[1], out=spare)


def _blur_(patches: Tensor, matrices: Tensor, rounding: Tensor, spare: Tensor) -> None:
    """Blur the columns of `patches` (n, 3, p, p) by `matrices` of the same shape; `spare` is overwritten."""
    flat, out = patches.flatten(0, 1), spare.flatten(0, 1)
    torch.baddbmm(rounding.reshape(-1, 1, 1), matrices.flatten(0, 1), flat, out=out)
    torch.floor(out, out=flat)


def _sharpen_(patches: Tensor, numbers: Tensor, matrices: Tensor, spare: Tensor, more: Tensor) -> None:
    """Move `patches` (n, 3, p, p) away from their rounded mean over 3 x 3 pixels, the middle counting 5 times.

    The outermost pixels stay, as torchvision has it; `numbers` as in `_Plan`, `matrices` the last of `_matrices`,
    `spare` and `more`, of the same shape, are overwritten.
    """
    unit_in, factor, unit_out = numbers
    sums, means, own = matrices
    flat, rows, smooth = patches.mul_(unit_in).flatten(0, 1), spare.flatten(0, 1), more.flatten(0, 1)
    torch.mm(flat.flatten(0, 1), sums.T, out=rows.flatten(0, 1))
    torch.bmm(means.expand_as(flat), rows, out=smooth).addcmul_(flat, own).round_()
    torch.lerp(more, patches, factor, out=patches)
    patches.clamp_(0, 255).mul_(unit_out).floor_()


def _jitter_(patches: Tensor, factors: Tensor, hue: Tensor, planes: Sequence[Tensor]) -> None:
    """Brightness before hue, hue, and brightness after it, of `patches` (N, 3, p, p); numbers as in `_Plan`.

    The six `planes` (N, pixels) are overwritten.
    """
    before, after, brightest = factors
    patches.mul_(before).clamp_(max=255).floor_().mul_(_TO_BYTE)
    _shift_hue_(patches.flatten(2), hue, planes)
    torch.minimum(patches.floor_().mul_(after), brightest, out=patches).floor_()


def _shift_hue_(patches: Tensor, hue: Tensor, planes: Sequence[Tensor]) -> None:
    """Turn the hue of `patches` (N, 3, pixels), saturation and value in HSV kept; the `planes` are overwritten.

    In units of a sixth of a turn times the chroma, so that nothing is divided: red's hue, then each channel's
    distance d from its own hue, which decides how far the channel stands above the lowest: 2 - d, in [0, 1].
    """
    red, green, blue = patches.unbind(1)
    low, high, chroma, offset, from_red, sign = planes
    torch.amin(patches, 1, out=low)
    torch.amax(patches, 1, out=high)
    torch.sub(high, low, out=chroma)
    torch.sub(chroma, low, out=offset)
    torch.add(green, blue, out=from_red).sub_(red).add_(offset).copysign_(torch.sub(green, blue, out=sign))
    low, high, chroma, offset, from_red = (x.unsqueeze(1) for x in (low, high, chroma, offset, from_red))
    torch.addcmul(from_red, chroma, hue, out=patches)  # within 6: twice around
    patches.abs_().sub_(chroma, alpha=3).abs_().sub_(offset)  # 3 - d, then (2 - d) chroma + low
    torch.clamp(patches, low, high, out=patches)


def send(values: Tensor, device: torch.device) -> Tensor:
    """`values` from the CPU to `device`, without waiting."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


_ROUTES = _routes()
