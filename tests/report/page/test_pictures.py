import base64
from io import BytesIO

import numpy as np
import pytest
from cases import each
from PIL import Image

from patchssl.report.page import pictures as module
from patchssl.report.page.pictures import SIDE, Pictures, thumbnail


def save(path, size=(300, 200), color=(200, 30, 30), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


@pytest.fixture
def root(tmp_path):
    save(tmp_path / "root" / "strong" / "1.jpg")
    save(tmp_path / "secret.jpg")
    return tmp_path / "root"


def decoded(url):
    kind, _, content = url.partition(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(BytesIO(base64.b64decode(content, validate=True)), formats=["JPEG"])


def test_a_picture_is_a_small_jpeg_of_the_same_shape(root):
    image = decoded(thumbnail(root / "strong" / "1.jpg"))
    assert image.size == (SIDE, round(SIDE * 200 / 300))
    assert np.abs(np.asarray(image).mean((0, 1)) - (200, 30, 30)).max() < 3


def test_nothing_of_the_original_file_but_its_pixels_is_kept(root):
    exif = Image.Exif()
    exif[0x010E] = "<script>where I live</script>"
    path = save(root / "x.jpg", exif=exif, comment=b"<script>")
    assert b"script" in path.read_bytes()
    assert b"script" not in base64.b64decode(thumbnail(path).partition(",")[2])


def test_the_same_image_is_kept_once(root):
    found = Pictures([root])
    assert found.number("strong/1.jpg", None, "set") == found.number("strong/1.jpg", None, "other") == 0
    assert len(found.urls) == 1


@each("name", ["../secret.jpg", "strong/../../secret.jpg", "..\\secret.jpg", "", "strong",
               "x\0.jpg", "a" * 5000, "ABSOLUTE"])
def test_an_image_outside_the_folders_is_never_shown(root, name):
    found = Pictures([root])
    assert found.number(str(root.parent / "secret.jpg") if name == "ABSOLUTE" else name, None, "../..") is None
    assert found.urls == [] and found.num_absent == 1


def test_nor_behind_a_link(root, tmp_path):
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "folder").symlink_to(tmp_path)
    found = Pictures([root])
    assert found.number("link.jpg", None, "set") is None
    assert found.number("folder/secret.jpg", None, "set") is None
    assert Pictures([root, tmp_path]).number("link.jpg", None, "set") == 0  # that folder was given too


def test_an_image_of_the_same_name_and_another_size_is_another_one(root):
    size = (root / "strong" / "1.jpg").stat().st_size
    found = Pictures([root])
    assert found.number("strong/1.jpg", size + 1, "set") is None
    assert found.number("strong/1.jpg", size, "set") == 0


@pytest.mark.parametrize("place", ["jpg/q.jpg", "made/jpg/q.jpg", "datasets/made/jpg/q.jpg", "distractors/q.jpg"])
def test_sets_are_found_as_they_lie(root, place):
    save(root / place)
    assert Pictures([root]).number("q.jpg", None, "made+others") == 0


@each("content", [b"", b"<svg onload=alert(1)>", b"<html><script>", b"%!PS", b"\xff\xd8\xff broken"])
def test_what_is_no_image_is_named_and_not_shown(root, content):
    (root / "x.jpg").write_bytes(content)
    found = Pictures([root])
    assert found.number("x.jpg", None, "set") is None
    (problem,) = found.problems
    assert "x.jpg" in problem and found.urls == []


def test_a_page_that_would_grow_too_large_says_what_it_leaves_out(root, monkeypatch):
    save(root / "2.jpg", color=(0, 0, 9))
    monkeypatch.setattr(module, "MOST_BYTES", 100)
    found = Pictures([root])
    assert [found.number(name, None, "set") for name in ("strong/1.jpg", "2.jpg")] == [0, None]
    assert found.num_over == 1
