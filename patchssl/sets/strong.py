"""Strong edits: what people do to a picture before they publish it again, one function for each kind.

The kinds follow what is said of Copydays' block `strong`: print and scan, paint, change in contrast,
perspective, blur, very strong crop (M. Douze et al., "Evaluation of GIST descriptors for web-scale image
search", CIVR 2009, section 4), and what copies on the web show besides: captions, stickers, a place on a page.
None of them shows a part of another photograph: a copy has one original.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from patchssl.sets.edits import (
    Color,
    Corners,
    Draws,
    Point,
    add_noise,
    blur,
    busiest_part,
    desaturate,
    paste_in_perspective,
    save_small,
    surface,
    text_block,
    tone_curve,
    uneven_light,
    write,
)

StrongEdit = Callable[[Image.Image, Draws], Image.Image]


def print_and_scan(photo: Image.Image, draws: Draws) -> Image.Image:
    """Printed with pale ink on white paper that lies askew on the scanner."""
    gamma, ink = draws.real("gamma", 0.75, 1.3), draws.real("ink", 0.12, 0.24)
    printed = desaturate(photo, draws.real("desaturated", 0.15, 0.6))
    printed = tone_curve(printed, lambda value: ink + (0.94 - ink) * value**gamma)
    tint = draws.color(225, 255)
    printed = Image.blend(printed, Image.new("RGB", printed.size, tint), 0.08)
    printed = _screened(blur(printed, draws.real("blur", 0.0008, 0.002)), draws)
    margin = draws.real("margin", 0.04, 0.16)
    page = _centered(printed, (1 + 2 * margin, 1 + 2 * margin), (244, 243, 238))
    angle = draws.real("turned", -7, 7)
    page = page.rotate(angle, Image.Resampling.BICUBIC, expand=True, fillcolor=(206, 207, 204))
    _specks(page, draws)
    scanned = add_noise(uneven_light(page, draws.real("light from", 0, 360), 0.12), draws, 8)
    return save_small(scanned, draws.whole("jpeg", 30, 70))


def photographed(photo: Image.Image, draws: Draws) -> Image.Image:
    """A print on a wall or a table, photographed from the side."""
    page = surface(photo.size, draws, _muted(draws))
    page = paste_in_perspective(page, photo, _from_the_side(page.size, draws))
    lit = uneven_light(page, draws.real("light from", 0, 360), draws.real("falloff", 0.2, 0.55))
    return add_noise(blur(lit, draws.real("blur", 0.0005, 0.0025)), draws, 10)


def changed_contrast(photo: Image.Image, draws: Draws) -> Image.Image:
    """Tones out of recognition: a photocopy, washed out, burnt, few levels, or one color."""
    look = draws.choice("look", ["photocopy", "washed out", "burnt", "few levels", "one color"])
    if look == "photocopy":
        middle, steep = draws.real("middle", 0.35, 0.6), draws.real("steepness", 3, 6)
        gray = ImageOps.autocontrast(photo.convert("L"), cutoff=1).convert("RGB")
        return add_noise(tone_curve(gray, lambda value: 0.5 + steep * (value - middle)), draws, 14)
    if look == "washed out":
        kept, floor = draws.real("contrast", 0.18, 0.35), draws.real("floor", 0.45, 0.62)
        return tone_curve(desaturate(photo, 0.4), lambda value: floor + kept * value)
    if look == "burnt":
        gamma = draws.real("gamma", 2.2, 3.5)
        return tone_curve(photo, lambda value: 1.15 * value**gamma)
    if look == "few levels":
        bits = draws.whole("bits", 1, 2)
        return ImageOps.posterize(ImageOps.autocontrast(photo, cutoff=2), bits).point(
            [round(value * 255 / (256 - 2 ** (8 - bits))) if value else 0 for value in range(256)] * 3)
    dark, light = draws.color(0, 90), draws.color(160, 255)
    return ImageOps.colorize(ImageOps.autocontrast(photo.convert("L"), cutoff=1), dark, light)


def painted_over(photo: Image.Image, draws: Draws) -> Image.Image:
    """Smoothed as if painted, then scribbled on with a broad brush."""
    # the median of half the size is as smooth and far quicker
    small = photo.reduce(2).filter(ImageFilter.MedianFilter(2 * draws.whole("smoothed", 1, 3) + 1))
    image = ImageOps.posterize(small.resize(photo.size, Image.Resampling.BICUBIC), 4)
    canvas = ImageDraw.Draw(image)
    for _ in range(draws.whole("strokes", 5, 12)):
        thick = round(draws.unnoted(0.012, 0.05) * max(photo.size))
        _stroke(canvas, _scribble(photo.size, draws), thick, draws.color())
    return image


def captioned(photo: Image.Image, draws: Draws) -> Image.Image:
    """Words on top: a joke in large letters, a watermark all over, or bands with a headline."""
    image = photo.copy()
    (width, height), style = photo.size, draws.choice("style", ["joke", "watermark", "headline"])
    if style == "joke":
        size = draws.real("letters", 0.09, 0.15) * height
        for y in (0.6 * size, height - 2.0 * size, height - 0.8 * size):
            write(image, draws.words(3).upper(), (width / 2, y + 0.1 * size), size, (255, 255, 255), (0, 0, 0))
    elif style == "watermark":
        layer, size = Image.new("RGB", (2 * width, 2 * height)), draws.real("letters", 0.06, 0.11) * height
        text = draws.words(2).upper()
        for row in range(int(2 * height / (2.2 * size)) + 1):
            write(layer, "    ".join([text] * 4), (width, 2.2 * size * row), size, (255, 255, 255), (0, 0, 0))
        turned = layer.rotate(draws.real("turned", 15, 40), Image.Resampling.BICUBIC)
        mask = turned.crop((width // 2, height // 2, width // 2 + width, height // 2 + height)).convert("L")
        strength = draws.real("opacity", 0.45, 0.75)
        image.paste((255, 255, 255), (0, 0), mask.point([round(strength * value) for value in range(256)]))
    else:
        top, bottom = draws.real("top band", 0.15, 0.3), draws.real("bottom band", 0.08, 0.2)
        band = draws.color(0, 110)
        page = Image.new("RGB", (width, round(height * (1 + top + bottom))), band)
        page.paste(image, (0, round(height * top)))
        write(page, draws.words(4).title(), (width / 2, height * top / 2), 0.4 * height * top, (255, 255, 255), band)
        write(page, draws.words(8), (width / 2, page.height - height * bottom / 2), 0.3 * height * bottom,
              (230, 230, 230), band)
        image = page
    return save_small(image, draws.whole("jpeg", 30, 75))


def stickers(photo: Image.Image, draws: Draws) -> Image.Image:
    """Flat shapes stuck on it and a broad frame around."""
    image = photo.copy()
    canvas, long = ImageDraw.Draw(image), max(photo.size)
    for _ in range(draws.whole("stickers", 3, 7)):
        x, y = draws.unnoted(0, 1) * photo.width, draws.unnoted(0, 1) * photo.height
        radius, fill = draws.unnoted(0.07, 0.19) * long, draws.color()
        edge, outline = max(2, round(0.1 * radius)), (255, 255, 255)
        if (kind := draws.unnoted(0, 3)) < 1:
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill, outline, edge)
            write(image, draws.words(1).upper(), (x, y), 0.4 * radius, outline, fill)
        elif kind < 2:
            canvas.polygon(_star((x, y), radius), fill, outline)
        else:
            canvas.rounded_rectangle((x - radius, y - radius / 2, x + radius, y + radius / 2), radius / 4, fill)
            write(image, draws.words(2), (x, y), 0.35 * radius, outline, fill)
    frame = draws.real("frame", 0, 0.09)
    return ImageOps.expand(image, round(frame * long), draws.color())


def on_a_page(photo: Image.Image, draws: Draws) -> Image.Image:
    """A small part of a page: headline, columns of print, blocks of color, and the photograph askew."""
    width, height = round(0.8 * max(photo.size)), max(photo.size)
    page = Image.new("RGB", (width, height), draws.color(225, 255))
    ink, gap = draws.color(0, 90), round(0.04 * width)
    write(page, draws.words(3).title(), (width / 2, 0.07 * height), 0.07 * height, ink, ink)
    columns = draws.whole("columns", 2, 3)
    each = (width - gap) // columns
    for column in range(columns):
        left = gap + column * each
        box = left, round(0.14 * height), left + each - gap, height - gap
        text_block(page, box, round(0.022 * height), draws, ink)
    canvas = ImageDraw.Draw(page)
    for _ in range(draws.whole("blocks", 1, 3)):
        x, y = draws.unnoted(0, 0.8) * width, draws.unnoted(0.15, 0.85) * height
        canvas.rectangle((x, y, x + 0.3 * width, y + 0.12 * height), draws.color())
    share = draws.real("width", 0.5, 0.8) * width / photo.width
    share = min(share, 0.6 * height / photo.height)
    small = photo.resize((round(photo.width * share), round(photo.height * share)), Image.Resampling.LANCZOS)
    mask = Image.new("L", small.size, 255)
    angle = draws.real("turned", -12, 12)
    small, mask = (part.rotate(angle, Image.Resampling.BICUBIC, expand=True) for part in (small, mask))
    left = round(draws.real("left", 0, 1) * max(0, width - small.width))
    top = round((0.12 + 0.88 * draws.real("top", 0, 1)) * max(0, height - small.height))
    page.paste(small, (left, top), mask)
    return save_small(page, draws.whole("jpeg", 40, 80))


def cropped_and_turned(photo: Image.Image, draws: Draws) -> Image.Image:
    """A small part of it, turned, perhaps mirrored."""
    share = math.sqrt(draws.real("area kept", 0.15, 0.35))
    width, height = round(share * photo.width), round(share * photo.height)
    part = photo.crop(draws.note("box", busiest_part(photo, (width, height), draws)))
    if draws.choice("mirrored", ["no", "no", "yes"]) == "yes":
        part = ImageOps.mirror(part)
    side = 1 if draws.choice("side", ["left", "right"]) == "left" else -1
    angle = side * draws.real("turned", 8, 40)
    corners = (0, 0, 0) if draws.choice("corners", ["black", "white"]) == "black" else (255, 255, 255)
    return part.rotate(angle, Image.Resampling.BICUBIC, expand=True, fillcolor=corners)


def blurred(photo: Image.Image, draws: Draws) -> Image.Image:
    """Out of focus, then shrunk and saved as small as can be."""
    image = blur(photo, draws.real("blur", 0.008, 0.02))
    scale = draws.real("shrunk", 0.2, 0.4)
    small = image.resize((max(8, round(image.width * scale)), max(8, round(image.height * scale))),
                         Image.Resampling.BILINEAR)
    return save_small(add_noise(small, draws, 8), draws.whole("jpeg", 5, 15))


STRONG_EDITS: Mapping[str, StrongEdit] = MappingProxyType({
    "print and scan": print_and_scan,
    "photographed": photographed,
    "contrast": changed_contrast,
    "paint": painted_over,
    "caption": captioned,
    "stickers": stickers,
    "page": on_a_page,
    "crop and turn": cropped_and_turned,
    "blur": blurred,
})


def _muted(draws: Draws) -> Color:
    """A color near to gray, as walls and tables have it."""
    gray = draws.whole("background", 70, 200)
    return draws.color(gray - 22, gray + 22)


def _centered(image: Image.Image, times: tuple[float, float], color: Color) -> Image.Image:
    """`image` in the middle of a page `times` as wide and high."""
    page = Image.new("RGB", (round(image.width * times[0]), round(image.height * times[1])), color)
    page.paste(image, ((page.width - image.width) // 2, (page.height - image.height) // 2))
    return page


def _screened(image: Image.Image, draws: Draws) -> Image.Image:
    """`image` with the dots of a printing screen, three or four pixels apart, slanting both ways."""
    apart = draws.whole("dots apart", 3, 4)
    x, y = np.arange(image.width)[None, :], np.arange(image.height)[:, None]
    dots = 9 * ((x + y) % apart == 0) + 9 * ((x - y) % apart == 0) - 6
    return Image.fromarray((np.asarray(image, dtype=np.int16) - dots[..., None]).clip(0, 255).astype(np.uint8))


def _specks(page: Image.Image, draws: Draws) -> None:
    """Dust and a scratch or two on the glass."""
    canvas = ImageDraw.Draw(page)
    for _ in range(12):
        x, y, radius = draws.unnoted(0, page.width), draws.unnoted(0, page.height), draws.unnoted(0.5, 2.5)
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), (90, 90, 90))
    x = draws.unnoted(0, page.width)
    canvas.line([(x, 0), (x + draws.unnoted(-6, 6), page.height)], (216, 214, 210))


def _from_the_side(size: tuple[int, int], draws: Draws) -> Corners:
    """Where the corners of a print come to lie on a picture of `size` when one side is far away."""
    width, height = size
    far, lean, margin = draws.real("far side", 0.45, 0.75), draws.real("lean", -0.08, 0.08), 0.05
    near = [(margin, margin + lean), (margin, 1 - margin + lean)]
    right = 0.5 + 0.45 * draws.real("width", 0.45, 0.9)
    middle = 0.5 + draws.real("tilt", -0.08, 0.08)
    half = far * (0.5 - margin)
    away = [(right, middle - half), (right, middle + half)]
    side = draws.choice("near", ["left", "right", "top", "bottom"])
    points = [near[0], away[0], away[1], near[1]]
    if side == "right":
        points = [(1 - x, y) for x, y in (points[1], points[0], points[3], points[2])]
    elif side == "top":
        points = [(y, x) for x, y in (points[0], points[3], points[2], points[1])]
    elif side == "bottom":
        points = [(y, 1 - x) for x, y in (points[1], points[2], points[3], points[0])]
    a, b, c, d = ((x * width, y * height) for x, y in points)
    return a, b, c, d


def _scribble(size: tuple[int, int], draws: Draws) -> list[Point]:
    """A hand's path across a part of the image."""
    x, y = draws.unnoted(0, size[0]), draws.unnoted(0, size[1])
    heading, points, step = draws.unnoted(0, 360), [(x, y)], 0.06 * max(size)
    for _ in range(round(draws.unnoted(4, 12))):
        heading += draws.unnoted(-70, 70)
        x, y = x + step * math.cos(math.radians(heading)), y + step * math.sin(math.radians(heading))
        points.append((x, y))
    return points


def _stroke(canvas: ImageDraw.ImageDraw, points: list[Point], thick: int, color: Color) -> None:
    canvas.line(points, color, thick, joint="curve")
    for x, y in (points[0], points[-1]):
        canvas.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), color)


def _star(center: Point, radius: float) -> list[Point]:
    """Ten corners of a star with five points."""
    reach = [radius if corner % 2 == 0 else 0.45 * radius for corner in range(10)]
    return [(center[0] + far * math.sin(math.pi * corner / 5), center[1] - far * math.cos(math.pi * corner / 5))
            for corner, far in enumerate(reach)]
