"""Looking at the ends of image files: whole ones pass, cut ones never do, and nothing but decoding condemns a file."""

import numpy as np
import pytest
from cases import each
from PIL import Image

from patchssl.data.decode import END, START, decode_image, quick_check, quick_check_file


def saved(path, **options):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path.read_bytes()


@each(("name", "options"), [
    ("1.jpg", {}), ("1.jpg", {"progressive": True}), ("1.png", {}), ("1.gif", {}), ("1.webp", {}),
    ("1.webp", {"lossless": True}), ("1.bmp", {})])
def test_a_whole_file_passes_and_no_beginning_of_it_does(tmp_path, name, options):
    path = tmp_path / name
    whole = saved(path, **options)
    assert quick_check_file(path)
    passing = [size for size in range(len(whole)) if quick_check(whole[:size][:START], whole[:size][-END:], size)]
    assert len(passing) <= (2 if name == "1.gif" else 0)  # two bytes of its colors happen to be like its end


@each("content", [b"", b"\xff\xd8", b"<!DOCTYPE html><html>", b"BM", b"RIFF\x00\x00\x00\x00WEB",
                   b"\xff\xd8\xff" + bytes(1 << 20)])
def test_what_is_no_image_does_not_pass(tmp_path, content):
    path = tmp_path / "1.jpg"
    path.write_bytes(content)
    assert not quick_check_file(path)


def test_what_cannot_be_opened_does_not_pass(tmp_path):
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    assert not any(quick_check_file(tmp_path / name) for name in ("gone.jpg", "never.jpg", "."))


@each("name", ["1.jpg", "1.png", "1.gif"])
def test_a_file_with_something_behind_its_end_is_left_to_the_decoder(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(saved(path) + b"\n\n")
    assert not quick_check_file(path)
    assert decode_image(path).shape == (9, 7, 3)


@pytest.mark.parametrize("name", ["1.tif", "1.ppm"])
def test_formats_without_an_end_are_left_to_the_decoder(tmp_path, name):
    saved(tmp_path / name)
    assert not quick_check_file(tmp_path / name)
