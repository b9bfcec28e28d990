"""Views of a landmark for a synthetic set in the revisited layout: of easy, of hard and of hardly any use.

A landmark is a box in a photograph; a view of it is a picture that shows it, all of it or a part, as another
camera might have on another day. What is easy, hard and junk follows F. Radenović et al., "Revisiting Oxford
and Paris", CVPR 2018, section 3.1: easy shows it clearly, hard is far off, from the side, covered or in poor
light, junk shows too little of it to tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from PIL import Image, ImageDraw, ImageOps

from patchssl.sets.edits import (
    Box,
    Draws,
    add_noise,
    blur,
    busiest_part,
    desaturate,
    paste_in_perspective,
    surface,
    tone_curve,
    uneven_light,
    warp_to_rectangle,
)

LandmarkView = Callable[[Image.Image, Box, Draws], Image.Image]


def draw_landmark(photo: Image.Image, draws: Draws) -> Box:
    """The box that is the landmark of a photograph, 0.45 to 0.65 of either side."""
    width = round(photo.width * draws.real("landmark width", 0.45, 0.65))
    height = round(photo.height * draws.real("landmark height", 0.45, 0.65))
    return busiest_part(photo, (width, height), draws)


def easy_view(photo: Image.Image, landmark: Box, draws: Draws) -> Image.Image:
    """The whole landmark, from a step aside, in a little other light."""
    view = _seen_from_aside(photo, landmark, draws, around=(0.12, 0.35), askew=0.08)
    gamma = draws.real("gamma", 0.8, 1.25)
    view = tone_curve(view, lambda value: value**gamma)
    return uneven_light(view, draws.real("light from", 0, 360), draws.real("falloff", 0, 0.2))


def from_the_side(photo: Image.Image, landmark: Box, draws: Draws) -> Image.Image:
    """Hard: most of the landmark, strongly foreshortened, with less color."""
    view = _seen_from_aside(photo, landmark, draws, around=(0, 0.1), askew=0.25)
    narrow = draws.real("foreshortened", 0.35, 0.55)
    if draws.choice("along", ["width", "height"]) == "width":
        view = view.resize((round(view.width * narrow), view.height), Image.Resampling.LANCZOS)
    else:
        view = view.resize((view.width, round(view.height * narrow)), Image.Resampling.LANCZOS)
    return uneven_light(desaturate(view, draws.real("desaturated", 0, 0.6)), draws.real("light from", 0, 360), 0.4)


def far_away(photo: Image.Image, landmark: Box, draws: Draws) -> Image.Image:
    """Hard: the landmark as a small part of another scene."""
    scene = surface(photo.size, draws, draws.color(120, 220))
    horizon = round(draws.real("horizon", 0.4, 0.7) * photo.height)
    scene.paste(surface((photo.width, photo.height - horizon), draws, draws.color(50, 130)), (0, horizon))
    small = photo.crop(_grown(landmark, 0.05, photo.size))
    share = draws.real("width", 0.22, 0.34) * min(photo.width / small.width, photo.height / small.height)
    width, height = share * small.width, share * small.height
    left = draws.real("left", 0.02, 0.98) * (photo.width - width)
    top = draws.real("top", 0.02, 0.98) * (photo.height - height)
    lean = draws.real("lean", -0.15, 0.15) * height
    corners = ((left, top), (left + width, top + max(0.0, lean)),
               (left + width, top + height - max(0.0, lean)), (left, top + height + min(0.0, lean)))
    return add_noise(paste_in_perspective(scene, small, corners), draws, 8)


def covered(photo: Image.Image, landmark: Box, draws: Draws) -> Image.Image:
    """Hard: half of the landmark behind posts and leaves."""
    view = _seen_from_aside(photo, landmark, draws, around=(0.02, 0.2), askew=0.08)
    canvas, green = ImageDraw.Draw(view), draws.whole("green", 30, 90)
    for _ in range(draws.whole("posts", 2, 4)):
        x, wide = draws.unnoted(0, 0.95) * view.width, draws.unnoted(0.04, 0.12) * view.width
        canvas.polygon([(x, 0), (x + wide, 0), (x + 1.3 * wide, view.height), (x - 0.3 * wide, view.height)],
                       draws.color(30, 60))
    for _ in range(draws.whole("leaves", 25, 50)):
        x, y = draws.unnoted(0, view.width), draws.unnoted(0, 1) ** 2 * view.height
        wide, high = draws.unnoted(0.03, 0.09) * view.width, draws.unnoted(0.02, 0.07) * view.height
        red, lighter, blue = draws.color(0, 40)
        canvas.ellipse((x - wide, y - high, x + wide, y + high), (red, green + lighter, blue))
    return view


def at_night(photo: Image.Image, landmark: Box, draws: Draws) -> Image.Image:
    """Hard: dark, bluish, noisy, from aside."""
    view = _seen_from_aside(photo, landmark, draws, around=(0, 0.3), askew=0.12)
    left = draws.real("light left", 0.25, 0.45)
    dark = tone_curve(desaturate(ImageOps.autocontrast(view, cutoff=1), 0.6), lambda value: left * value**1.4)
    blue = Image.blend(dark, Image.new("RGB", dark.size, (12, 18, 48)), 0.25)
    return add_noise(blur(blue, 0.002), draws, 16)


def a_part_of_it(photo: Image.Image, landmark: Box, draws: Draws) -> Image.Image:
    """Hard: about a third of the landmark, out of focus."""
    part = _part(photo, landmark, draws, (0.5, 0.65))
    return blur(part, draws.real("blur", 0.002, 0.008))


def junk_view(photo: Image.Image, landmark: Box, draws: Draws) -> Image.Image:
    """A hundredth of the landmark or little more, blown up."""
    part = _part(photo, landmark, draws, (0.1, 0.16))
    return blur(part.resize((4 * part.width, 4 * part.height), Image.Resampling.BICUBIC), 0.01)


HARD_VIEWS: Mapping[str, LandmarkView] = MappingProxyType({
    "from the side": from_the_side,
    "far away": far_away,
    "covered": covered,
    "at night": at_night,
    "a part of it": a_part_of_it,
})


def _seen_from_aside(
    photo: Image.Image, landmark: Box, draws: Draws, *, around: tuple[float, float], askew: float
) -> Image.Image:
    """The whole landmark with a margin of `around` its sides, every corner pulled out by up to `askew` of them.

    `askew` <= 0.25 keeps the corners convex. Nothing from outside of the photograph is seen.
    """
    left, top, right, bottom = _grown(landmark, draws.real("margin", *around), photo.size)
    wide, high = askew * (landmark[2] - landmark[0]), askew * (landmark[3] - landmark[1])
    pulled = [(x + draws.unnoted(0, 1) * wide * sideways, y + draws.unnoted(0, 1) * high * upright)
              for x, y, sideways, upright in ((left, top, -1, -1), (right, top, 1, -1),
                                              (right, bottom, 1, 1), (left, bottom, -1, 1))]
    a, b, c, d = ((round(min(max(x, 0), photo.width), 1), round(min(max(y, 0), photo.height), 1))
                  for x, y in pulled)
    draws.note("corners", [*a, *b, *c, *d])
    size = round((b[0] - a[0] + c[0] - d[0]) / 2), round((d[1] - a[1] + c[1] - b[1]) / 2)
    return warp_to_rectangle(photo, (a, b, c, d), size)


def _part(photo: Image.Image, landmark: Box, draws: Draws, share: tuple[float, float]) -> Image.Image:
    """A part of the landmark whose sides are `share` (least, most) of its own."""
    width, height = landmark[2] - landmark[0], landmark[3] - landmark[1]
    wide, high = (max(1, round(side * draws.real(f"part's {name}", *share)))
                  for side, name in ((width, "width"), (height, "height")))
    left = landmark[0] + round(draws.unnoted(0, 1) * (width - wide))
    top = landmark[1] + round(draws.unnoted(0, 1) * (height - high))
    draws.note("part", [left, top, left + wide, top + high])
    return photo.crop((left, top, left + wide, top + high))


def _grown(box: Box, share: float, size: tuple[int, int]) -> Box:
    """`box` with a margin of `share` of its sides, as far as an image of `size` reaches."""
    left, top, right, bottom = box
    wide, high = round(share * (right - left)), round(share * (bottom - top))
    return max(0, left - wide), max(0, top - high), min(size[0], right + wide), min(size[1], bottom + high)
