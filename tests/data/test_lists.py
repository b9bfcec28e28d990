import shutil
from pathlib import Path

import numpy as np
import pytest
from cases import each
from PIL import Image

from patchssl.data.lists import open_list
from patchssl.data.open import open_images, open_pair, split_names
from patchssl.runtime.errors import DataError


@pytest.fixture
def root(tmp_path):
    """Four images in two folders, and one whose name has a space."""
    for value, name in enumerate(["a/0.png", "a/1.png", "b/2.png", "b/3.png", "a/my photo.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 6), value, dtype=np.uint8)).save(tmp_path / name)
    return tmp_path


def write(root: Path, text: str, name: str = "list.txt") -> Path:
    path = root / name
    path.write_bytes(text.encode())
    return path


@each(("text", "classes", "labels"), [
    ("b/2.png\tdog\na/0.png\tcat\n", ("cat", "dog"), [1, 0]),
    ("b/2.png 3\na/0.png 0\n", ("0", "1", "2", "3"), [3, 0]),
    ("b/2.png\t1\r\na/0.png\t0\r\n", ("0", "1"), [1, 0]),
    ("\ufeff# first\n\nb/2.png\n   \n  # more\n./a/0.png", ("a", "b"), [1, 0]),  # no labels: folders are classes
    ("b/2.png    1\na/0.png    0", ("0", "1"), [1, 0]),
])
def test_lists_as_people_write_them(root, text, classes, labels):
    images = open_images(write(root, text))
    assert (images.classes, images.labels.tolist()) == (classes, labels)
    assert [images.pixels(i)[0, 0, 0] for i in range(2)] == [2, 0]  # in the list's order
    assert images.describe() == f"list {root}/list.txt: 2 images in {len(classes)} classes"


def test_names_with_spaces_and_labels_with_spaces(root):
    images = open_images(write(root, "a/my photo.png\tbig cat\na/0.png\tdog\n"))
    assert (images.item_name(0), images.classes) == ("a/my photo.png", ("big cat", "dog"))
    assert open_images(write(root, "a/my photo.png\na/0.png\n")).labels is None


def test_absolute_paths_say_the_same_wherever_the_list_lies(root, tmp_path_factory):
    other = tmp_path_factory.mktemp("lists")
    images = open_images(write(other, f"{root}/a/0.png 0\n{root}/b/2.png 1\n"))
    assert [images.item_name(i) for i in range(2)] == ["a/0.png", "b/2.png"]
    near = open_images(write(root, "a/0.png 0\nb/2.png 1\n"))
    assert images.fingerprint == near.fingerprint


def test_the_fingerprint_depends_on_labels_and_not_on_their_order(root):
    prints = [open_images(write(root, text)).fingerprint for text in (
        "a/0.png\tx\nb/2.png\ty\n", "b/2.png\ty\na/0.png\tx\n", "a/0.png\ty\nb/2.png\tx\n", "a/0.png\nb/2.png\n")]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    moved = root.parent / f"{root.name}-moved"
    shutil.copytree(root, moved)
    assert open_images(write(moved, "a/0.png\tx\nb/2.png\ty\n")).fingerprint == prints[0]


def test_train_and_val_lists(root):
    write(root, "a/0.png\tcat\nb/2.png\tdog\n", "train.txt")
    write(root, "b/3.png\tdog\n", "val.txt")
    for data in (root, f"{root}/{{train,val}}.txt"):
        assert split_names(data) == ("train", "val")
        train, val = open_pair(data)
        assert (train.classes, val.classes, val.labels.tolist()) == (("cat", "dog"), ("cat", "dog"), [1])
        assert (train.name, train.split, val.name) == (root.name, "train", root.name)
    write(root, "b/3.png\tbird\n", "val.txt")
    with pytest.raises(DataError, match=r"1 of the 1 classes in list .*val\.txt .*: bird"):
        open_pair(root)


def test_one_list_alone_does_not_hide_a_folder_of_images(root):
    write(root, "a/0.png\n", "train.txt")
    assert len(open_images(root)) == 5


@each(("text", "message"), [
    ("a/0.png\tcat\n# no\na/1.png\tdog\nb/2.png\n", r"list\.txt, line 4: it has no label, unlike most"),
    ("a/0.png\na/1.png 7\nb/2.png\n", r"list\.txt, line 2: it has a label, unlike most"),
    ("a/0.png\na/1.png\n./a/0.png\n", r"list\.txt, line 3: \./a/0\.png is in line 1 already"),
    ("a/0.png\t\n", r"line 1: a label is missing"),
    ("\tcat\n", r"line 1: a path is missing"),
    ("a/0.png -1\na/1.png 0\n", r"list .*list\.txt holds the label '-1'"),
    ("a/0.png 1700000000\n", r"labels of 1,000,000 or more"),
    ("a/0.png 9999999999999999999999999999\n", r"labels of 1,000,000 or more"),
    ("# nothing\n\n", r"list\.txt names no image"),
    ("a/0.png\0\n", r"it is no text"),
    ("a/9.png\na/0.png\nb/8.png\n", r"2 of 3 files are not there:\n  .*/a/9\.png\n  .*/b/8\.png$"),
    ("a\n", r"1 of 1 files are not there"),  # a folder is no image
])
def test_lists_that_are_refused(root, text, message):
    with pytest.raises(DataError, match=message):
        open_list(write(root, text), "all", False)


def test_parts_and_unreadable_images_are_named(root):
    (root / "a/1.png").write_text("no image")
    images = open_images(write(root, "a/0.png 0\na/1.png 1\nb/2.png 1\n"))
    with pytest.raises(DataError, match=r"a/1\.png cannot be read as an image"):
        images.pixels(1)
    part = images.subset([2, 0])
    assert (part.labels.tolist(), part.item_name(0), part.classes) == ([1, 0], "b/2.png", ("0", "1"))
    assert type(part) is type(images)
