import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from cases import each
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from patchssl.data.decode import EXTENSIONS
from patchssl.data.images import ArrayImages, FileImages, Names
from patchssl.data.open import open_images
from patchssl.runtime.errors import DataError, UnreadableImage

NEEDS = "; .heic needs pip install pillow-heif" * (".heic" not in EXTENSIONS)


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (5, 7)) -> np.ndarray:
    """A lossless image of random pixels (height, width as in `size`)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def tree(root: Path, names: Sequence[str] = ("a/1.png", "a/2.png", "b/1.png")) -> Path:
    for seed, name in enumerate(names):
        write_image(root / name, seed)
    return root


def arrays(count: int = 6, gray: bool = False) -> ArrayImages:
    shape = (count, 4, 5) if gray else (count, 4, 5, 3)
    return ArrayImages(
        name="set",
        split="train",
        source="here",
        classes=("x", "y", "z"),
        labels=np.arange(count) % 3,
        array=np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8),
        ids=np.arange(count),
    )


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))))
def test_names_are_a_sequence_of_strings(strings):
    names = Names(strings)
    assert list(names) == strings
    assert len(names) == len(strings)
    assert list(pickle.loads(pickle.dumps(names))) == strings
    for outside in (-1, len(strings)):
        with pytest.raises(IndexError):
            names[outside]


def test_names_that_are_no_unicode(tmp_path):
    raw = b"caf\xe9.png"
    write_image(tmp_path / "a.png").tobytes()
    (tmp_path / "a.png").rename(tmp_path / raw.decode("utf-8", "surrogateescape"))
    images = open_images(tmp_path)
    assert images.pixels(0).shape == (5, 7, 3)
    assert len(images.fingerprint) == 64
    pickle.loads(pickle.dumps(images)).pixels(0)


def test_arrays_give_their_pixels_as_the_callers_own():
    images = arrays()
    images.pixels(2)[:] = 0
    np.testing.assert_array_equal(images.pixels(2), images.array[2])
    assert images.pixels(2).any()
    assert images.item_name(2) == "train/00002"


def test_gray_arrays_repeat_in_three_channels():
    images = arrays(gray=True)
    pixels = images.pixels(np.int64(3))
    assert pixels.shape == (4, 5, 3)
    for channel in range(3):
        np.testing.assert_array_equal(pixels[..., channel], images.array[3])


@pytest.mark.parametrize("index", [-1, 6])
def test_an_index_outside_is_an_error(index):
    for ask in (arrays().pixels, arrays().item_name, lambda i: arrays().subset([0, i])):
        with pytest.raises(IndexError):
            ask(index)


def test_subsets_of_arrays_share_them_and_keep_names_and_labels():
    images = arrays()
    part = images.subset(np.array([5, 1]))
    again = part.subset([1])
    assert part.array is images.array
    assert [part.item_name(i) for i in range(2)] == ["train/00005", "train/00001"]
    assert part.labels is not None
    assert part.labels.tolist() == [2, 1]
    np.testing.assert_array_equal(again.pixels(0), images.pixels(1))
    assert again.describe() == "part of here: 1 train image in 3 classes"
    assert len(images.subset([])) == 0


def test_subsets_of_files_keep_names_and_labels(tmp_path):
    images = open_images(tree(tmp_path / "set"))
    part = images.subset([2, 0])
    assert [part.item_name(i) for i in range(2)] == ["b/1.png", "a/1.png"]
    assert part.labels is not None
    assert part.labels.tolist() == [1, 0]
    assert part.classes == ("a", "b")
    np.testing.assert_array_equal(part.pixels(0), images.pixels(2))


def test_fingerprint_of_files_does_not_know_place_or_order(tmp_path):
    here = open_images(tree(tmp_path / "here"))
    # elsewhere, made in another order, seen through a link
    for seed, name in reversed(list(enumerate(["a/1.png", "a/2.png", "b/1.png"]))):
        write_image(tmp_path / "far/away" / name, seed)
    (tmp_path / "link").symlink_to(tmp_path / "far/away")
    assert open_images(tmp_path / "far/away").fingerprint == here.fingerprint
    assert open_images(tmp_path / "link").fingerprint == here.fingerprint
    assert here.subset([2, 0, 1]).fingerprint == here.fingerprint


def added(root: Path) -> None:
    write_image(root / "b/2.png")


def removed(root: Path) -> None:
    (root / "a/2.png").unlink()


def renamed(root: Path) -> None:
    (root / "a/2.png").rename(root / "a/3.png")


def moved(root: Path) -> None:
    (root / "a/2.png").rename(root / "b/2.png")


def resized(root: Path) -> None:
    write_image(root / "a/2.png", seed=1, size=(9, 9))


@each("change", [added, removed, renamed, moved, resized])
def test_fingerprint_of_files_changes_with_them(change, tmp_path):
    before = open_images(tree(tmp_path)).fingerprint
    assert open_images(tmp_path).fingerprint == before
    change(tmp_path)
    assert open_images(tmp_path).fingerprint != before


def test_fingerprint_of_files_changes_with_a_subset_and_with_the_rule_for_truncated_files(tmp_path):
    images = open_images(tree(tmp_path))
    lenient = open_images(tmp_path, allow_truncated=True)
    assert len({images.fingerprint, images.subset([0, 1]).fingerprint, lenient.fingerprint}) == 3


def test_fingerprint_of_arrays_changes_with_pixels_labels_and_choice_but_not_with_order():
    images = arrays()
    pixels, labels = arrays(), arrays()
    pixels.array[4, 0, 0, 0] ^= 1
    assert labels.labels is not None
    labels.labels[4] = 2
    others = [
        pixels,
        labels,
        images.subset([0, 1, 2, 3, 4]),
        images.subset([1, 2, 3, 4, 5]),
        arrays(gray=True),
    ]
    assert len({images.fingerprint, *(other.fingerprint for other in others)}) == 6
    assert images.subset([3, 1, 0, 2, 5, 4]).fingerprint == images.fingerprint == arrays().fingerprint


def test_both_kinds_survive_pickling(tmp_path):
    for images in (arrays(), open_images(tree(tmp_path))):
        copy = pickle.loads(pickle.dumps(images))
        assert copy.fingerprint == images.fingerprint
        np.testing.assert_array_equal(copy.pixels(1), images.pixels(1))
        assert repr(copy) == repr(images)


def test_files_that_cannot_be_read_are_named_by_their_path(tmp_path):
    images = open_images(tree(tmp_path))
    (tmp_path / "a/2.png").write_text("no image")
    with pytest.raises(UnreadableImage) as refused:
        images.pixels(1)
    assert refused.value.name == str(tmp_path / "a/2.png")


def test_labels_that_are_required(tmp_path):
    assert arrays().require_labels().tolist() == [0, 1, 2, 0, 1, 2]
    images = open_images(tree(tmp_path, ["1.png", "2.png"]))
    with pytest.raises(DataError, match=r"2 images without labels; this needs labels: .* folder named after"):
        images.require_labels()


def test_with_classes_translates_labels_by_name():
    images = arrays().with_classes(("z", "w", "y", "x"))
    assert images.labels is not None
    assert images.labels.tolist() == [3, 2, 0, 3, 2, 0]
    with pytest.raises(DataError, match=r"2 of the 3 classes in here .*: x, z;"):
        arrays().with_classes(("y",))


def test_files_say_what_was_left_out(tmp_path):
    tree(tmp_path / "set", ["1.png"])
    (tmp_path / "set/2.heic").touch()
    images = open_images(tmp_path / "set")
    assert isinstance(images, FileImages)
    assert images.describe() == (
        f"folder {tmp_path}/set: 1 image without labels; skipped 1 file with other extensions (.heic 1)" + NEEDS
    )
