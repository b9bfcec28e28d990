import json

import numpy as np
import pytest
from cases import each
from PIL import Image

from patchssl.sets.edits import (
    Draws,
    busiest_part,
    paste_in_perspective,
    save_small,
    square_to_quad,
    tone_curve,
    uneven_light,
    warp_to_rectangle,
    write,
)
from patchssl.sets.landmarks import HARD_VIEWS, draw_landmark, easy_view, junk_view
from patchssl.sets.strong import STRONG_EDITS

QUADS = [
    ((0, 0), (8, 0), (8, 4), (0, 4)),
    ((10, 20), (90, 5), (80, 70), (25, 50)),
    ((30, 3), (60, 8), (95, 60), (2, 55)),
]


def picture(width=160, height=120):
    """Smooth and colorful, with a dark and a bright corner."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    red, green, blue = 255 * x * y, 128 + 127 * np.sin(9 * x), 128 + 127 * np.cos(7 * y + 3 * x)
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


def coded(width, height):
    """Red tells the column, green the row."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8))


@each("quad", QUADS)
def test_the_unit_square_comes_to_lie_on_the_quadrilateral(quad):
    a, b, c, d, e, f, g, h = square_to_quad(quad)
    for (x, y), corner in zip([(0, 0), (1, 0), (1, 1), (0, 1)], quad, strict=True):
        w = g * x + h * y + 1
        assert ((a * x + b * y + c) / w, (d * x + e * y + f) / w) == pytest.approx(corner)


@pytest.mark.parametrize("quad", QUADS[1:])
def test_a_warp_shows_at_each_pixel_what_eight_equations_say(quad):
    size = (40, 30)
    shown = np.asarray(warp_to_rectangle(coded(100, 80), quad, size), dtype=float)
    rectangle = [(0, 0), (size[0], 0), size, (0, size[1])]
    rows = [row for (x, y), (u, v) in zip(rectangle, quad, strict=True)
            for row in ([x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y])]
    matrix = np.append(np.linalg.solve(rows, np.ravel(quad)), 1).reshape(3, 3)
    for row in range(2, 28, 5):
        for column in range(2, 38, 5):
            u, v, w = matrix @ [column + 0.5, row + 0.5, 1]
            assert shown[row, column, :2] == pytest.approx([u / w - 0.5, v / w - 0.5], abs=1)


@pytest.mark.parametrize("quad", QUADS[1:])
def test_pasting_is_the_way_back_from_warping(quad):
    image = picture(90, 70)
    page = paste_in_perspective(Image.new("RGB", (100, 80), (1, 2, 3)), image, quad)
    back = np.asarray(warp_to_rectangle(page, quad, image.size), dtype=int)
    inside = slice(8, -8)
    assert np.abs(back - np.asarray(image, dtype=int))[inside, inside].mean() < 6
    assert page.getpixel((0, 79)) == page.getpixel((99, 0)) == (1, 2, 3)


def test_draws_depend_on_the_entropy_alone_and_are_written_down():
    first, again, other = Draws(1, 2), Draws(1, 2), Draws(1, 3)
    numbers = [draws.real("a", -2, 5) for draws in (first, again, other)]
    assert numbers[0] == numbers[1] != numbers[2]
    kinds = [draws.choice("b", ["x", "y", "z"]) for draws in (first, again)]
    whole = [draws.whole("c", 3, 4) for draws in (first, again)]
    assert first.record == {"a": numbers[0], "b": kinds[0], "c": whole[0]} == again.record
    with pytest.raises(ValueError, match="'a' is drawn twice"):
        first.real("a", 0, 1)


def test_draws_fill_their_ranges():
    draws = Draws(0)
    wholes = [draws.whole(str(number), 2, 4) for number in range(60)]
    assert set(wholes) == {2, 3, 4}
    reals = [draws.real(f"r{number}", -1, 3) for number in range(200)]
    assert -1 <= min(reals) < -0.8 and 2.8 < max(reals) <= 3
    assert sorted(draws.order(9)) == list(range(9)) != draws.order(9)
    noise = draws.noise((50, 40), 8)
    assert noise.shape == (40, 50)
    assert -8 <= noise.min() < -5 and 5 < noise.max() <= 8


def test_a_tone_curve_is_applied_to_every_level_and_clipped():
    levels = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2))
    doubled = np.asarray(tone_curve(levels, lambda value: 2 * value - 0.2))[0]
    np.testing.assert_array_equal(doubled[:, 0], (2 * np.arange(256) - 51).clip(0, 255))
    np.testing.assert_array_equal(doubled[:, 0], doubled[:, 2])


def test_light_falls_off_towards_its_direction():
    gray = Image.new("RGB", (50, 40), (200, 200, 200))
    right = np.asarray(uneven_light(gray, 0, 0.5))[..., 0].astype(int)
    assert (right[:, 0] > 195).all() and (abs(right[:, -1] - 100) < 5).all()
    down = np.asarray(uneven_light(gray, 90, 0.5))[..., 0].astype(int)
    assert (down[0] > 195).all() and (abs(down[-1] - 100) < 5).all()


def test_the_busiest_part_is_where_there_is_something_to_see():
    pixels = np.full((100, 200, 3), 90, dtype=np.uint8)
    pixels[60:90, 150:190] = np.random.default_rng(0).integers(0, 255, (30, 40, 3))
    left, top, right, bottom = busiest_part(Image.fromarray(pixels), (80, 50), Draws(0), tries=40)
    assert (right - left, bottom - top) == (80, 50)
    assert left <= 155 and right >= 185 and top <= 65 and bottom >= 85
    assert busiest_part(Image.fromarray(pixels), (200, 100), Draws(0)) == (0, 0, 200, 100)


def test_writing_shrinks_to_the_width():
    page = Image.new("RGB", (120, 60))
    write(page, "a sentence that is far too long for this", (60, 30), 40, (255, 255, 255), (255, 255, 255))
    columns = np.flatnonzero(np.asarray(page).any(axis=(0, 2)))
    assert columns.min() > 0 and columns.max() < 119 and columns.size > 60


def test_saving_small_is_what_jpeg_does():
    rough = np.asarray(save_small(picture(), 4), dtype=int)
    fine = np.asarray(save_small(picture(), 95), dtype=int)
    errors = [np.abs(pixels - np.asarray(picture(), dtype=int)).mean() for pixels in (rough, fine)]
    assert errors[0] > 3 * errors[1]


@pytest.mark.slow
@each("size", [(64, 64), (64, 300), (300, 64), (161, 97)])
@each("kind", STRONG_EDITS)
def test_strong_edits_are_strong_repeat_and_fit_any_photograph(kind, size):
    photo = picture(*size)
    before = photo.tobytes()
    for seed in range(3):
        draws = Draws(seed)
        copy = STRONG_EDITS[kind](photo, draws)
        assert copy.mode == "RGB" and min(copy.size) >= 8
        assert copy.tobytes() == STRONG_EDITS[kind](photo, Draws(seed)).tobytes()
        assert copy.tobytes() != STRONG_EDITS[kind](photo, Draws(seed + 100)).tobytes()
        square = [np.asarray(image.resize((64, 64)), dtype=int) for image in (photo, copy)]
        assert np.abs(square[0] - square[1]).mean() > 3  # a plain copy in JPEG of quality 75 has less than 2
        assert json.loads(json.dumps(draws.record))
    assert photo.tobytes() == before


@each("kind", ["blur", "contrast", "paint", "caption", "stickers"])
def test_what_stays_in_place_still_shows_the_original(kind):
    """The copy is nearer to its original than to the mirrored one, by the correlation of grays."""
    photo = picture(320, 240)
    nearer = 0
    for seed in range(10):
        copy = np.asarray(STRONG_EDITS[kind](photo, Draws(seed)).resize((64, 48)).convert("L"), dtype=float)
        gray = np.asarray(photo.resize((64, 48)).convert("L"), dtype=float)
        nearer += np.corrcoef(copy.ravel(), gray.ravel())[0, 1] > np.corrcoef(copy[:, ::-1].ravel(), gray.ravel())[0, 1]
    assert nearer == 10


LANDMARK = (60, 50, 180, 130)
MARKS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))


def marked():
    """A gray photograph whose landmark is white with a patch of another color in each corner."""
    photo = Image.new("RGB", (240, 180), (100, 100, 100))
    left, top, right, bottom = LANDMARK
    photo.paste((255, 255, 255), LANDMARK)
    for (x, y), color in zip([(left, top), (right - 16, top), (left, bottom - 16), (right - 16, bottom - 16)], MARKS,
                             strict=True):
        photo.paste(color, (x, y, x + 16, y + 16))
    return photo


def seen(view):
    """Which of the four colors are to be seen, and the share of the view that is bright or one of them."""
    pixels = np.asarray(view, dtype=int).reshape(-1, 3)
    peak = pixels.max(axis=1, keepdims=True)
    shown = []
    for color in MARKS:
        high = np.array(color) > 0
        hit = (pixels[:, high] > 0.7 * peak).all(axis=1) & (pixels[:, ~high] < 0.35 * peak).all(axis=1)
        shown.append(int((hit & (peak[:, 0] > 60)).sum()) > 10)
    return shown, float((peak[:, 0] > 150).mean())


@each("seed", range(8))
def test_an_easy_view_shows_the_whole_landmark_large_and_clear(seed):
    view = easy_view(marked(), LANDMARK, Draws(seed))
    shown, share = seen(view)
    assert shown == [True] * 4
    assert 0.3 < share < 0.95


@each("seed", range(8))
def test_hard_views_show_less_of_it(seed):
    views = {kind: view(marked(), LANDMARK, Draws(seed)) for kind, view in HARD_VIEWS.items()}
    assert 0.02 < seen(views["far away"].point(lambda value: value if value > 240 else 0))[1] < 0.12
    assert np.asarray(views["at night"]).mean() < 0.6 * np.asarray(marked()).mean()
    assert sum(seen(views["a part of it"])[0]) <= 2  # its sides are two thirds at most: two neighboring corners
    red, green, blue = np.moveaxis(np.asarray(views["covered"]), -1, 0)
    behind = (views_peak := np.maximum(red, blue)) < 62  # posts are as dark, leaves green: the photograph is neither
    assert 0.15 < (behind & (np.maximum(views_peak, green) < 140)).mean() < 0.65
    ratio = np.divide(*views["from the side"].size) / (120 / 80)
    assert max(ratio, 1 / ratio) > 1.5


@each("seed", range(8))
def test_junk_shows_a_small_part_blown_up(seed):
    draws = Draws(seed)
    view = junk_view(marked(), LANDMARK, draws)
    left, top, right, bottom = draws.record["part"]
    assert 0.005 < (right - left) * (bottom - top) / (120 * 80) < 0.03
    assert LANDMARK[0] <= left and right <= LANDMARK[2] and LANDMARK[1] <= top and bottom <= LANDMARK[3]
    assert view.size == (4 * (right - left), 4 * (bottom - top))


@each("size", [(64, 64), (300, 64), (64, 200)])
def test_views_of_any_photograph_repeat(size):
    photo = picture(*size)
    for seed, view in enumerate([easy_view, junk_view, *HARD_VIEWS.values()]):
        landmark = draw_landmark(photo, Draws(seed))
        assert 0 <= landmark[0] < landmark[2] <= size[0] and 0 <= landmark[1] < landmark[3] <= size[1]
        draws = Draws(seed)
        first = view(photo, landmark, draws)
        assert first.tobytes() == view(photo, landmark, Draws(seed)).tobytes()
        assert first.tobytes() != view(photo, landmark, Draws(seed + 50)).tobytes()
        assert json.loads(json.dumps(draws.record))
