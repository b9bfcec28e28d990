"""The index of a folder tree: as the folders are looked at, never as they were."""

import os
import time
from pathlib import Path

import pytest
from packing import png

from patchssl.data import decode, trees
from patchssl.data.decode import list_images
from patchssl.data.open import open_images
from patchssl.data.trees import list_tree


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A tree whose folders changed long ago, as far as trees are told, so that its index is kept."""
    monkeypatch.setenv("PATCHSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trees, "_WORTH_KEEPING", 3)
    monkeypatch.setattr(trees, "RACY", -10**12)
    root = tmp_path / "set"
    for name in ("cat/1.png", "cat/deep/2.png", "dog/3.png", "dog/n\udcff.png", "dog/notes.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(1))
    (root / "empty").mkdir()
    return root


def assert_listed(root):
    """As a walk finds it."""
    found, right = list_tree(root), list_images(root)
    assert list(found.names) == right.names
    assert dict(found.others) == right.others


@pytest.fixture
def walks(monkeypatch):
    """How often a tree was walked through."""
    seen, real = [], trees.walk_images
    monkeypatch.setattr(trees, "walk_images", lambda root: seen.append(root) or real(root))
    return seen


def test_a_tree_that_has_not_changed_is_not_walked_again(tree, walks):
    first = open_images(tree)
    assert len(walks) == 1
    again = open_images(tree)
    assert len(walks) == 1
    assert (list(again.names), again.labels.tolist(), again.classes, again.describe()) == (
        list(first.names), first.labels.tolist(), first.classes, first.describe())
    assert_listed(tree)
    (tree / "dog/3.png").write_bytes(png(9))  # what a file holds is no part of it
    assert_listed(tree)
    assert len(walks) == 1


@pytest.mark.parametrize("change", [
    lambda root: (root / "cat/deep/4.png").touch(),
    lambda root: (root / "dog/3.png").unlink(),
    lambda root: (root / "dog/3.png").rename(root / "dog/5.png"),
    lambda root: (root / "dog/notes.txt").rename(root / "dog/notes.png"),
    lambda root: (root / "empty/6.png").touch(),
    lambda root: (root / "new").mkdir() or (root / "new/7.png").touch(),
    lambda root: (root / "cat").rename(root / "cow"),
    lambda root: (root / "empty").rmdir(),
])
def test_every_change_of_names_is_seen(change, tree, walks):
    before = list_tree(tree)
    time.sleep(0.02)  # the clock of folders
    change(tree)
    walks.clear()
    assert_listed(tree)
    assert len(walks) == 1
    assert len(before.names) == 4


@pytest.mark.parametrize("damage", [
    lambda content: content[:50], lambda content: b"", lambda content: content[:-8] + b"\x01" * 8,
    lambda content: content[:32] + b"\xff" * (len(content) - 32), lambda content: content + b"\0" * 8,
])
def test_a_damaged_index_is_made_again(damage, tree, walks):
    list_tree(tree)
    [kept] = (Path(os.environ["PATCHSSL_CACHE"]) / "trees").iterdir()
    kept.write_bytes(damage(kept.read_bytes()))
    assert_listed(tree)
    assert len(walks) == 2
    assert_listed(tree)
    assert len(walks) == 2


def test_an_index_whose_checksum_fits_may_still_lie(tree, walks):
    list_tree(tree)
    [kept] = (Path(os.environ["PATCHSSL_CACHE"]) / "trees").iterdir()
    for at, value in ((1, 2**60), (2, -1), (3, 7), (6, 0)):
        numbers = trees.load_numbers(kept, None)
        numbers[at] = value
        trees.store_numbers(kept, numbers)
        walks.clear()
        assert_listed(tree)
        assert len(walks) == 1


def test_folders_that_changed_just_now_are_not_relied_on(tree, walks, monkeypatch):
    monkeypatch.setattr(trees, "RACY", 3600 * 10**9)
    for _ in range(2):
        assert_listed(tree)
    assert len(walks) == 2


def test_formats_that_became_readable_are_looked_for(tree, walks, monkeypatch):
    list_tree(tree)
    more = decode.EXTENSIONS | {".txt"}
    monkeypatch.setattr(trees, "EXTENSIONS", more)
    monkeypatch.setattr(decode, "EXTENSIONS", more)
    assert_listed(tree)
    assert len(list_tree(tree).names) == 5


def test_a_link_that_may_become_a_folder_keeps_no_index(tree, walks):
    (tree / "later").symlink_to(tree.parent / "nowhere")
    for _ in range(2):
        assert_listed(tree)
    assert len(walks) == 2
