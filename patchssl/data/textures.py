"""The embedded set *textures*: ten kinds of pattern, told apart by their shape and never by their color.

Colors, scale, turn, place, line width, light and noise of every image are drawn anew, so that raw pixels and
untrained networks stay near chance while the pattern itself is plain to see.
Only PCG64's raw output, integer arithmetic and integer tables are used: every machine makes the same bytes.

Fixed-point units: an image's side is 2048, a turn 1024, a period of a pattern 1024, a sine of 1 is 1 << 14.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchssl.runtime.errors import UsageError, unknown_choice

Ints = NDArray[np.int32]
Mask = NDArray[np.bool_]

SIZES = (32, 64)
COUNTS = {"train": 6000, "val": 1500}
_SEEDS = {"train": 2310, "val": 18651}

_SIDE = 2048
_TURN = 1024
_ONE = 14  # sine and cosine are in units of 1 / (1 << 14)
_PERIOD = 1024
_HALF = _PERIOD // 2
_WAVES = 6  # plane waves in a blob pattern
_CHUNK = 100  # images drawn at once: bounds the memory, never changes the bytes
_LUMA = (77, 150, 29)  # weights of red, green and blue in luma, times 256
_CONTRAST = (56, 96)  # luma between the two colors of an image
_CHROMA = 64  # tint of a channel before its luma is taken out, at most


class Frame(NamedTuple):
    """N images as a pattern sees them: where every sample lies, and what else is free."""

    u: Ints  # (N, S, S) turned, scaled and shifted coordinates, in periods / 1024
    v: Ints
    width: Ints  # (N, 1, 1) in 0..255: thickness of lines, size of dots, as the pattern reads it
    waves: Ints  # (N, _WAVES, 2) direction and phase of plane waves, turns / 1024
    sine: Ints  # (1024,) one turn


Pattern = Callable[[Frame], Mask]  # which samples, (N, S, S), have the second color


def _wrap(x: Ints) -> Ints:
    """Signed offset from the nearest whole period, in -512..511."""
    return ((x + _HALF) & (_PERIOD - 1)) - _HALF


def _line(x: Ints, low: int, width: Ints) -> Mask:
    """Lines across `x`, one a period, from `low` to `low` + 255 units wide."""
    return (x & (_PERIOD - 1)) < low + width


def _root(squares: Ints) -> Ints:
    """Whole square roots, rounded down, of values below 2**28; exact, by search in a table of squares."""
    table = np.arange(1 << 14, dtype=np.int32) ** 2
    return (np.searchsorted(table, squares, side="right") - 1).astype(np.int32)


def _stripes(at: Frame) -> Mask:
    return _line(at.u, 384, at.width)


def _checks(at: Frame) -> Mask:
    return ((at.u // 640 + at.v // 640) & 1) == 0


def _dots(at: Frame) -> Mask:
    shifted = at.u + ((at.v // _PERIOD) & 1) * _HALF
    return _wrap(shifted) ** 2 + _wrap(at.v - _HALF) ** 2 < (300 + at.width // 4) ** 2


def _rings(at: Frame) -> Mask:
    u, v = at.u * 5 // 8, at.v * 5 // 8
    square = _wrap(u) ** 2 + _wrap(v) ** 2
    return (square < 460**2) & (square > (230 + at.width // 4) ** 2)


def _grid(at: Frame) -> Mask:
    return _line(at.u, 180, at.width // 2) | _line(at.v, 180, at.width // 2)


def _zigzag(at: Frame) -> Mask:
    return _line(at.u + np.abs(_wrap(at.v * 5 // 8)) * 3 // 2, 384, at.width)


def _bricks(at: Frame) -> Mask:
    row = at.v * 5 // 4
    column = at.u * 5 // 8 + ((row // _PERIOD) & 1) * _HALF
    return _line(row, 220, at.width // 2) | _line(column, 110, at.width // 4)


def _diamonds(at: Frame) -> Mask:
    return np.abs(_wrap(at.u)) + np.abs(_wrap(at.v // 2)) < 400 + at.width // 4


def _circles(at: Frame) -> Mask:
    return _line(_root(at.u**2 + at.v**2), 384, at.width)


def _blobs(at: Frame) -> Mask:
    total = np.zeros_like(at.u)
    apart = _TURN // (2 * _WAVES)  # directions spread over half a turn, or blobs would look like stripes
    for wave in range(_WAVES):
        turn, phase = at.waves[:, wave, :1, None] % apart + wave * apart, at.waves[:, wave, 1:, None]
        along = (at.u * _cosine(at.sine, turn) + at.v * at.sine[turn]) >> _ONE
        total += at.sine[((along * 5 >> 3) + phase) & (_TURN - 1)]
    return total > 0


_PATTERNS: dict[str, Pattern] = {
    "stripes": _stripes, "checks": _checks, "dots": _dots, "rings": _rings, "grid": _grid, "zigzag": _zigzag,
    "bricks": _bricks, "diamonds": _diamonds, "circles": _circles, "blobs": _blobs,
}  # fmt: skip
CLASSES: tuple[str, ...] = tuple(_PATTERNS)


def sine_table() -> Ints:
    """Sine of 0, 1, ... 1023 / 1024 of a turn times 1 << 14, rounded; whole numbers only.

    The smallest angle comes from a quarter turn by halving, the others by adding it up, to 96 binary digits.
    """
    one = 1 << 96
    cosine = 0  # of a quarter turn
    for _ in range(8):
        cosine = math.isqrt((one + cosine) * one // 2)
    step = (cosine, math.isqrt(one * one - cosine * cosine))
    x, y, sines = one, 0, []
    for _ in range(_TURN // 4 + 1):
        sines.append((y * 2 * (1 << _ONE) + one) // (2 * one))
        x, y = (x * step[0] - y * step[1]) // one, (x * step[1] + y * step[0]) // one
    half = sines + sines[-2:0:-1]
    return np.array(half + [-s for s in half], dtype=np.int32)


def _cosine(sine: Ints, turn: Ints) -> Ints:
    return sine[(turn + _TURN // 4) & (_TURN - 1)]


def _integers(bits: np.random.PCG64, low: int, high: int, *shape: int) -> Ints:
    """Whole numbers low..high, both included, from the upper half of each raw word."""
    words = np.asarray(bits.random_raw(math.prod(shape)), dtype=np.uint64) >> np.uint64(32)
    scaled = (words * np.uint64(high - low + 1)) >> np.uint64(32)
    return (scaled.astype(np.int32) + np.int32(low)).reshape(shape)


def _bytes(bits: np.random.PCG64, *shape: int) -> Ints:
    """Whole numbers -128..127, eight from each raw word, lowest byte first; asked for in multiples of 8."""
    words = np.asarray(bits.random_raw(math.prod(shape) // 8), dtype="<u8")
    return (words.view(np.uint8).astype(np.int32) - 128).reshape(shape)


def _axis(samples: int) -> Ints:
    """Centers of `samples` samples along the side, from the middle of the image."""
    step = _SIDE // samples
    return np.arange(samples, dtype=np.int32) * step + (step - _SIDE) // 2


def _frame(bits: np.random.PCG64, count: int, samples: int, sine: Ints) -> Frame:
    """Draw scale (3.25 to 5.5 periods a side), turn, place and widths of `count` images."""
    scale = _integers(bits, 832, 1408, count, 1, 1)  # periods along the side, times 256
    turn = _integers(bits, 0, _TURN - 1, count, 1, 1)
    place = _integers(bits, -640, 639, count, 2, 1, 1)  # shift of the pattern, side / 2048
    width = _integers(bits, 0, 255, count, 1, 1)
    waves = _integers(bits, 0, _TURN - 1, count, _WAVES, 2)
    cosine, sine_of = scale * _cosine(sine, turn) >> 11, scale * sine[turn] >> 11
    axis = _axis(samples)
    x, y = axis[None, None, :] - place[:, 0], axis[None, :, None] - place[:, 1]
    return Frame((x * cosine - y * sine_of) >> 12, (x * sine_of + y * cosine) >> 12, width, waves, sine)


def _colors(bits: np.random.PCG64, count: int) -> Ints:
    """Two colors per image, (N, 2, 1, 1, 3): a bounded step of luma apart, each tinted at its own luma."""
    lower = _integers(bits, 40, 215 - _CONTRAST[1], count)
    step = _integers(bits, *_CONTRAST, count)
    swapped = _integers(bits, 0, 1, count)
    luma = np.stack([lower + step * swapped, lower + step * (1 - swapped)], axis=1)
    tint = _integers(bits, -_CHROMA, _CHROMA, count, 2, 3)
    tint -= (tint @ np.array(_LUMA, dtype=np.int32) >> 8)[..., None]
    return (luma[..., None] + tint)[:, :, None, None, :]


def _light(bits: np.random.PCG64, count: int, size: int, sine: Ints) -> Ints:
    """Linear gradient of light across the image in any direction, (N, S, S, 1), 256 in the middle."""
    turn = _integers(bits, 0, _TURN - 1, count, 1, 1)
    strength = _integers(bits, 32, 128, count, 1, 1)
    axis = _axis(size)
    along = (axis[None, None, :] * _cosine(sine, turn) + axis[None, :, None] * sine[turn]) >> _ONE
    return (256 + (along * strength >> 10))[..., None]


def _paint(bits: np.random.PCG64, pattern: Pattern, count: int, size: int) -> NDArray[np.uint8]:
    """Draw `count` images (N, size, size, 3) of one pattern; a pixel is the mean of 2 x 2 samples."""
    sine = sine_table()
    inside = pattern(_frame(bits, count, 2 * size, sine)).astype(np.int32)
    inside = inside[:, ::2] + inside[:, 1::2]
    covered = (inside[:, :, ::2] + inside[:, :, 1::2])[..., None]  # quarters of a pixel
    back, front = np.moveaxis(_colors(bits, count), 1, 0)
    color = (back * (4 - covered) + front * covered) >> 2
    lit = color * _light(bits, count, size, sine) >> 8
    amplitude = _integers(bits, 4, 20, count, 1, 1, 1)
    noisy = lit + (_bytes(bits, count, size, size, 3) * amplitude >> 7)
    return noisy.clip(0, 255).astype(np.uint8)


def textures(split: str, size: int = 32) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (N, size, size, 3) uint8 RGB and labels (N,) int64 of one split: 6,000 to train, 1,500 to test.

    `split` is "train" or "val", `size` 32 or 64 pixels; image i shows `CLASSES[i % 10]`, so that any run of
    images is balanced. The bytes are the same on every machine. UsageError on another split or size.
    """
    if split not in COUNTS:
        raise UsageError(unknown_choice("split of the set textures", str(split), COUNTS))
    if size not in SIZES:
        raise UsageError(unknown_choice("size of the set textures", str(size), map(str, SIZES)))
    count = COUNTS[split]
    images = np.empty((count, size, size, 3), dtype=np.uint8)
    for label, pattern in enumerate(_PATTERNS.values()):
        bits = np.random.PCG64([_SEEDS[split], size, label])
        mine = images[label :: len(CLASSES)]
        for start in range(0, len(mine), _CHUNK):
            part = mine[start : start + _CHUNK]
            part[:] = _paint(bits, pattern, len(part), size)
    return images, np.arange(count, dtype=np.int64) % len(CLASSES)
