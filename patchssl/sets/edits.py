"""Edits of photographs, each with its numbers drawn from a generator and written down.

Everything is whole-number or plain floating-point arithmetic and Pillow's own: the same draws give the same
pixels with the same versions of Pillow and NumPy. Images are RGB throughout.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Color = tuple[int, int, int]
Point = tuple[float, float]  # x, y in pixels
Corners = tuple[Point, Point, Point, Point]  # top left, top right, bottom right, bottom left
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, right and bottom not included
Value = float | int | str | list[float] | list[int]
T = TypeVar("T")

_WORDS = (
    "summer", "holiday", "sale", "market", "today", "news", "limited", "offer", "photo", "travel", "city", "garden",
    "river", "mountain", "story", "report", "weekend", "free", "music", "best", "price", "open", "guide", "light",
    "view", "north", "south", "winter", "event", "morning", "paper",
)


class Draws:
    """Random numbers of one image, a function of `entropy` alone; `record` holds what was drawn by name."""

    def __init__(self, *entropy: int) -> None:
        self._rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))
        self.record: dict[str, Value] = {}

    def real(self, name: str, low: float, high: float) -> float:
        """A number in [low, high], rounded to the three decimals that are written down."""
        return self.note(name, round(low + (high - low) * self._rng.random(), 3))

    def whole(self, name: str, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return self.note(name, int(self._rng.integers(low, high + 1)))

    def choice(self, name: str, options: Sequence[str]) -> str:
        """One of `options`."""
        return self.note(name, options[int(self._rng.integers(len(options)))])

    def note(self, name: str, value: T) -> T:
        """Write down what follows from draws that are not."""
        if name in self.record:
            raise ValueError(f"'{name}' is drawn twice for one image")
        self.record[name] = value  # type: ignore[assignment]
        return value

    def unnoted(self, low: float, high: float) -> float:
        """A number in [low, high) that is not worth writing down: of one stroke or one word among many."""
        return low + (high - low) * self._rng.random()

    def order(self, count: int) -> list[int]:
        """0 to count - 1, shuffled."""
        return [int(i) for i in self._rng.permutation(count)]

    def words(self, count: int) -> str:
        """Some words to print, not written down."""
        return " ".join(_WORDS[int(i)] for i in self._rng.integers(len(_WORDS), size=count))

    def color(self, low: int = 0, high: int = 255) -> Color:
        """A color whose channels lie in low..high, not written down."""
        red, green, blue = self._rng.integers(low, high + 1, size=3).tolist()
        return red, green, blue

    def noise(self, size: tuple[int, int], amplitude: int) -> np.ndarray:
        """Whole numbers from -amplitude to amplitude, peaked at 0, for an image of `size` = (width, height)."""
        halves = self._rng.integers(-amplitude, amplitude + 1, size=(2, size[1], size[0]), dtype=np.int16)
        return (halves[0] + halves[1]) // 2


def warp_to_rectangle(image: Image.Image, corners: Corners, size: tuple[int, int]) -> Image.Image:
    """The quadrilateral `corners` of `image` seen straight on: an image of `size` = (width, height).

    What lies outside of `image` is black.
    """
    width, height = size
    a, b, c, d, e, f, g, h = square_to_quad(corners)
    data = (a / width, b / height, c, d / width, e / height, f, g / width, h / height)
    return image.transform(size, Image.Transform.PERSPECTIVE, data, Image.Resampling.BICUBIC)


def paste_in_perspective(page: Image.Image, image: Image.Image, corners: Corners) -> Image.Image:
    """`page` with `image` on it, its corners at `corners` of the page: what a camera sees from the side."""
    a, b, c, d, e, f, g, h = square_to_quad(corners)
    # the inverse of a projective map, up to a factor that cancels
    rows = (e - f * h, c * h - b, b * f - c * e,
            f * g - d, a - c * g, c * d - a * f,
            d * h - e * g, b * g - a * h, a * e - b * d)
    scale = rows[8]
    data = tuple(value / scale * side
                 for value, side in zip(rows[:8], [image.width] * 3 + [image.height] * 3 + [1, 1], strict=True))
    shown = image.transform(page.size, Image.Transform.PERSPECTIVE, data, Image.Resampling.BICUBIC)
    covered = Image.new("L", (4 * page.width, 4 * page.height))  # four times as fine: smooth edges
    ImageDraw.Draw(covered).polygon([(4 * x, 4 * y) for x, y in corners], fill=255)
    mask = covered.resize(page.size, Image.Resampling.BOX)
    return Image.composite(shown, page, mask)


def square_to_quad(corners: Corners) -> tuple[float, ...]:
    """a..h of the map (x, y) -> ((ax + by + c)/w, (dx + ey + f)/w), w = gx + hy + 1, from the unit square.

    Its corners (0, 0), (1, 0), (1, 1), (0, 1) come to lie at `corners`. P. Heckbert, "Fundamentals of texture
    mapping and image warping", 1989, section 2.2.3.
    """
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = corners
    sx, sy = x0 - x1 + x2 - x3, y0 - y1 + y2 - y3
    dx1, dx2, dy1, dy2 = x1 - x2, x3 - x2, y1 - y2, y3 - y2
    area = dx1 * dy2 - dx2 * dy1
    g, h = (sx * dy2 - dx2 * sy) / area, (dx1 * sy - sx * dy1) / area
    return x1 - x0 + g * x1, x3 - x0 + h * x3, x0, y1 - y0 + g * y1, y3 - y0 + h * y3, y0, g, h


def busiest_part(photo: Image.Image, size: tuple[int, int], draws: Draws, tries: int = 6) -> Box:
    """Of `tries` drawn places for a box of `size` = (width, height), the one with the most contrast inside.

    People cut out what there is to see, not empty sky.
    """
    gray, best = np.asarray(photo.convert("L"), dtype=np.int64), (-1.0, (0, 0))
    for _ in range(tries):
        left = int(draws.unnoted(0, photo.width - size[0] + 1))
        top = int(draws.unnoted(0, photo.height - size[1] + 1))
        part = gray[top : top + size[1] : 2, left : left + size[0] : 2]
        best = max(best, (float(part.std()), (left, top)))
    left, top = best[1]
    return left, top, left + size[0], top + size[1]


def tone_curve(image: Image.Image, curve: Callable[[float], float]) -> Image.Image:
    """`image` with every channel passed through `curve`, from [0, 1] to [0, 1]; what leaves it is clipped."""
    table = [min(255, max(0, round(255 * curve(value / 255)))) for value in range(256)]
    return image.point(table * 3)


def add_noise(image: Image.Image, draws: Draws, amplitude: int) -> Image.Image:
    """`image` with gray noise of up to `amplitude` levels."""
    noisy = np.asarray(image, dtype=np.int16) + draws.noise(image.size, amplitude)[..., None]
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def blur(image: Image.Image, share: float) -> Image.Image:
    """`image` blurred by a Gaussian whose radius is `share` of the long side."""
    return image.filter(ImageFilter.GaussianBlur(share * max(image.size)))


def desaturate(image: Image.Image, share: float) -> Image.Image:
    """`image` with `share` of its color taken out: 1 leaves gray."""
    return Image.blend(image, image.convert("L").convert("RGB"), share)


def uneven_light(image: Image.Image, direction: float, strength: float) -> Image.Image:
    """`image` under light that falls off by `strength` (0..1) towards `direction` (degrees, 0 to the right)."""
    x = np.linspace(-0.5, 0.5, image.width)[None, :] * math.cos(math.radians(direction))
    y = np.linspace(-0.5, 0.5, image.height)[:, None] * math.sin(math.radians(direction))
    gain = 1 - strength * (0.5 + x + y).clip(0, 1)
    return Image.fromarray((np.asarray(image) * gain[..., None]).clip(0, 255).astype(np.uint8))


def save_small(image: Image.Image, quality: int) -> Image.Image:
    """`image` as it comes back from a JPEG file of `quality`."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def surface(size: tuple[int, int], draws: Draws, color: Color) -> Image.Image:
    """A table, a wall or paper to lay something on: `color` with coarse and fine grain."""
    coarse = draws.noise((max(2, size[0] // 24), max(2, size[1] // 6)), 14) + 128
    grain = Image.fromarray(coarse.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    levels = np.asarray(grain, dtype=np.int16) - 128 + draws.noise(size, 5)
    return Image.fromarray((levels[..., None] + np.array(color, dtype=np.int16)).clip(0, 255).astype(np.uint8))


def font(pixels: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, `pixels` high."""
    return ImageFont.load_default(max(6, round(pixels)))


def write(image: Image.Image, text: str, center: Point, pixels: float, fill: Color, edge: Color) -> None:
    """Write one line onto `image`, `pixels` high or less where it would be wider than the image."""
    canvas = ImageDraw.Draw(image)
    wide = canvas.textlength(text, font(pixels))
    pixels *= min(1.0, 0.94 * image.width / wide)
    outline = max(1, round(pixels / 14))
    canvas.text(center, text, fill, font(pixels), anchor="mm", stroke_width=outline, stroke_fill=edge)


def text_block(image: Image.Image, box: Box, line: int, draws: Draws, ink: Color) -> None:
    """Fill `box` of `image` with lines of small print, `line` pixels apart."""
    canvas = ImageDraw.Draw(image)
    left, top, right, bottom = box
    kind = font(0.7 * line)
    for y in range(top, bottom - line + 1, line):
        text = draws.words(3)
        while canvas.textlength(text, kind) < right - left:
            text += " " + draws.words(3)
        while text and canvas.textlength(text, kind) > right - left:
            text = text.rpartition(" ")[0]
        canvas.text((left, y), text, ink, kind)
