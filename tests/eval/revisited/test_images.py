"""What a network gets to see of an image: sizes by hand, the right pixels, a fingerprint of all that moves them."""

import pickle

import numpy as np
import pytest
from cases import each
from PIL import Image

from patchssl.data.images import FileImages, Names
from patchssl.eval.revisited.images import PreparedImages, prepare_pixels
from patchssl.runtime.errors import UnreadableImage


def gradient(width, height):
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([columns * 255 // width, rows * 255 // height, 0 * rows], axis=-1).astype(np.uint8)


@each(("size", "longest", "expected"), [
    ((2048, 1024), 1024, (1024, 512)), ((1024, 2048), 512, (256, 512)), ((300, 200), 512, (300, 200)),
    ((512, 100), 512, (512, 100)), ((1000, 333), 224, (224, 75)), ((640, 480), None, (640, 480))])
def test_the_longest_side_is_bounded_and_nothing_enlarged(size, longest, expected):
    assert prepare_pixels(gradient(*size), None, longest).shape == (expected[1], expected[0], 3)


@each(("box", "expected"), [
    ((0, 0, 2048, 1024), (1024, 512)), ((100, 100, 1100, 500), (500, 200)), ((7.4, 10.6, 407.4, 810.6), (200, 400)),
    ((0, 0, 90, 30), (45, 15))])
def test_a_query_is_resized_by_the_factor_of_the_whole_image(box, expected):
    """2048 pixels to 1024: half, also where the box alone would fit."""
    assert prepare_pixels(gradient(2048, 1024), box, 1024).shape == (expected[1], expected[0], 3)


def test_a_box_shows_what_lies_in_it():
    pixels = gradient(100, 80)
    assert np.array_equal(prepare_pixels(pixels, (10.4, 20.6, 50.4, 60.6), 1024), pixels[21:61, 10:50])
    assert np.array_equal(prepare_pixels(pixels, (10, 20, 50, 60), None), pixels[20:60, 10:50])


def test_what_of_a_box_lies_outside_is_black():
    pixels = np.full((80, 100, 3), 200, np.uint8)
    found = prepare_pixels(pixels, (-10, 40, 60, 90), None)
    assert found.shape == (50, 70, 3)
    assert (found[:40, 10:] == 200).all()
    assert found[40:].max() == found[:, :10].max() == 0


@each("box", [(100, 0, 120, 10), (-20, 0, 0, 10), (0, 80, 10, 90), (5, 5, 5.2, 30), (0, 0, 1e9, 10),
              (0, 0, 10, 1e300), (-150, 0, 60, 10)])
def test_a_box_without_a_pixel_of_the_image_or_far_too_large(box):
    with pytest.raises(ValueError, match="its box"):
        prepare_pixels(gradient(100, 80), box, 1024)


def test_a_downscaled_image_keeps_its_colors():
    small = prepare_pixels(gradient(1000, 600), None, 100).astype(int)
    assert abs(small - gradient(100, 60).astype(int)).max() <= 5


@pytest.fixture
def folder(tmp_path):
    for name, size in (("a", (60, 40)), ("b", (30, 50)), ("c", (20, 20))):
        Image.fromarray(gradient(*size)).save(tmp_path / f"{name}.png")
    return tmp_path


def prepared(folder, names=("a.png", "b.png", "c.png"), boxes=(None, (1, 2, 21, 32), None), **options):
    files = FileImages(name="made", split="all", source="test", root=folder, names=Names(names))
    return PreparedImages(name="made", split="all", source="test", files=files, boxes=boxes, **options)


def test_images_are_prepared_one_by_one_and_cross_to_another_process(folder):
    images = pickle.loads(pickle.dumps(prepared(folder, longest=25)))
    assert [images.pixels(index).shape for index in range(3)] == [(17, 25, 3), (15, 10, 3), (20, 20, 3)]
    assert [images.item_name(index) for index in range(3)] == ["a.png", "b.png its box (1, 2, 21, 32)", "c.png"]
    chosen = images.subset([2, 1])
    assert [chosen.pixels(index).shape for index in range(2)] == [(20, 20, 3), (15, 10, 3)]


def test_pixels_are_those_stored_whatever_the_orientation_says(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(gradient(60, 40)).save(folder / "a.png", exif=exif)
    assert np.array_equal(prepared(folder).pixels(0), gradient(60, 40))


def test_the_fingerprint_knows_the_preparation_but_not_the_order(folder):
    base = prepared(folder, longest=25)
    other = prepared(folder, ("c.png", "a.png", "b.png"), (None, None, (1, 2, 21, 32)), longest=25)
    assert other.fingerprint == base.fingerprint
    changed = [prepared(folder), prepared(folder, longest=26), prepared(folder, boxes=(None,) * 3, longest=25),
               prepared(folder, boxes=(None, (1, 2, 21, 33), None), longest=25),
               prepared(folder, boxes=((1, 2, 21, 32), None, None), longest=25)]
    assert len({base.fingerprint, *(images.fingerprint for images in changed)}) == 6


def test_one_file_may_serve_two_queries(folder):
    """Two boxes in one file, swapped: other pixels under each index, so other names."""
    first = prepared(folder, ("a.png", "a.png"), ((0, 0, 20, 20), (5, 5, 30, 30)))
    second = prepared(folder, ("a.png", "a.png"), ((5, 5, 30, 30), (0, 0, 20, 20)))
    assert [first.item_name(index) for index in (0, 1)] == [second.item_name(index) for index in (1, 0)]


def test_too_small_for_the_network(folder):
    images = prepared(folder, longest=25, least=16)
    images.pixels(0)
    with pytest.raises(UnreadableImage, match=r"b\.png .*its box \(1, 2, 21, 32\) has 10 x 15 .*needs 16"):
        images.pixels(1)
