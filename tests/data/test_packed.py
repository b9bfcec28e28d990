import multiprocessing
import pickle

import numpy as np
import pytest
from packing import pack, png, unpack

from patchssl.data.decode import EXTENSIONS
from patchssl.data.open import open_images, open_pair, split_names
from patchssl.data.unreadable import find_unreadable
from patchssl.runtime.errors import DataError, UnreadableImage

SPLIT = {"train/b/1.png": png(1), "train/a/1.png": png(2), "train/a/2.png": png(3, (9, 7)), "val/b/9.png": png(4),
         "val/notes.txt": b"no image"}
CLASSES = {"dog/x/1.png": png(1), "dog/2.png": png(2), "cat/1.png": png(3)}
FLAT = {"1.png": png(1), "2.png": png(2)}
below = {f"set/{name}": content for name, content in SPLIT.items()}

both = pytest.mark.parametrize("suffix", [".tar", ".zip"])

NEEDS = "; .heic needs pip install pillow-heif" * (".heic" not in EXTENSIONS)


@both
@pytest.mark.parametrize("files", [SPLIT, CLASSES, FLAT, {"train/a/1.png": png(1), "train/b/1.png": png(1)}],
                         ids=["splits", "classes", "flat", "train alone"])
def test_an_archive_is_what_its_folder_is(files, suffix, tmp_path):
    """The folder is the oracle: splits, order, labels, pixels and fingerprint."""
    folder = unpack(tmp_path / "pets", files)
    archive = pack(tmp_path / "archives" / f"pets{suffix}", files)
    assert split_names(archive) == split_names(folder)
    for split in split_names(folder):
        asked = None if split == "all" else split
        expected, images = open_images(folder, asked), open_images(archive, asked)
        assert (images.name, images.split, images.classes) == (expected.name, expected.split, expected.classes)
        np.testing.assert_array_equal(images.labels, expected.labels)
        names = [expected.item_name(i) for i in range(len(expected))]
        assert [images.item_name(i) for i in range(len(images))] == names
        for index in range(len(names)):
            np.testing.assert_array_equal(images.pixels(index), expected.pixels(index))
        assert images.fingerprint == expected.fingerprint
        assert images.subset([0]).fingerprint == expected.subset([0]).fingerprint
        truncated = open_images(archive, asked, allow_truncated=True)
        assert truncated.fingerprint == open_images(folder, asked, allow_truncated=True).fingerprint


@both
def test_a_folder_that_holds_all_the_rest_is_looked_through(suffix, tmp_path):
    train, val = open_pair(pack(tmp_path / f"x{suffix}", {f"./top/{name}": content for name, content in below.items()}))
    assert [train.item_name(i) for i in range(3)] == ["a/1.png", "a/2.png", "b/1.png"]
    assert (train.classes, val.classes, val.labels.tolist()) == (("a", "b"), ("a", "b"), [1])
    images = open_images(pack(tmp_path / f"y{suffix}", {f"top/{name}": content for name, content in CLASSES.items()}))
    assert images.classes == ("cat", "dog")


def test_describe_says_where_and_what_was_left_out(tmp_path):
    path = pack(tmp_path / "x.tar", {"a/1.png": png(1), "b/1.png": png(2), "b/1.txt": b"words", "c.HEIC": b""})
    assert open_images(path).describe() == (f"archive {path}: 2 images in 2 classes; skipped 2 files with other "
                                            f"extensions (.heic 1, .txt 1){NEEDS}")


def test_train_and_val_as_two_archives(tmp_path):
    train = {name.removeprefix("train/"): content for name, content in SPLIT.items() if name.startswith("train")}
    pack(tmp_path / "set/train.tar", train)
    pack(tmp_path / "set/val.zip", {"b/9.png": png(4)})
    opened = open_pair(tmp_path / "set")
    assert [(images.name, images.split, len(images)) for images in opened] == [("set", "train", 3), ("set", "val", 1)]
    assert opened[1].labels.tolist() == [1]
    assert open_images(tmp_path / "set/train.tar").name == "set"
    with pytest.raises(DataError, match="of several kinds"):
        (tmp_path / "set/train.txt").write_text("1.png\n")
        open_images(f"{tmp_path}/set/{{train.tar,train.txt}}")


def test_several_archives_are_one_set(tmp_path):
    pack(tmp_path / "set/part1.zip", {"a/1.png": png(1), "b/1.png": png(2)})
    pack(tmp_path / "set/part2.zip", {"b/2.png": png(3), "c/1.png": png(4)})
    images = open_images(tmp_path / "set")
    assert (images.classes, images.labels.tolist()) == (("a", "b", "c"), [0, 1, 1, 2])
    assert [int(images.pixels(i)[0, 0, 0]) for i in range(4)] == [1, 2, 3, 4]
    assert images.item_name(2) == "part2.zip/b/2.png"
    assert images.describe() == f"2 archives in {tmp_path}/set: 4 images in 3 classes"


def test_archives_beside_images_or_folders_are_not_the_set(tmp_path):
    unpack(tmp_path, CLASSES)
    pack(tmp_path / "backup.zip", FLAT)
    assert len(open_images(tmp_path)) == 3


@both
def test_unreadable_images_are_named(suffix, tmp_path):
    whole = png(5, (40, 40))
    path = pack(tmp_path / f"x{suffix}", {"0.png": whole, "1.png": b"no image", "2.png": whole[:60], "3.png": b""})
    bad = find_unreadable(open_images(path), workers=2)
    assert [name for name, _ in bad] == [f"{path}: {i}.png" for i in (1, 2, 3)]
    assert "no known image format" in bad[0][1]
    with pytest.raises(UnreadableImage, match=r": 3\.png cannot be read as an image: the file is empty"):
        open_images(path).pixels(3)


def test_archives_without_images(tmp_path):
    with pytest.raises(DataError, match=r"0 images in .*x\.zip; it holds 1 file with other extensions \(\.txt 1\)"):
        open_images(pack(tmp_path / "x.zip", {"1.txt": b"words"}))
    with pytest.raises(DataError, match=r"0 images in .*y\.tar; it holds no files at all"):
        open_images(pack(tmp_path / "y.tar", {}))


def test_archives_that_look_split_and_are_not(tmp_path):
    with pytest.raises(DataError, match=r"archive .*x\.zip holds Test/, val/; call what to train on train/"):
        open_images(pack(tmp_path / "x.zip", {"Test/a/1.png": png(1), "val/a/1.png": png(2)}))
    pack(tmp_path / "set/train.zip", SPLIT)
    pack(tmp_path / "set/val.zip", FLAT)
    with pytest.raises(DataError, match=r"train\.zip is named as train and holds train and val images"):
        open_images(tmp_path / "set")


def test_classes_that_only_val_has_are_named(tmp_path):
    path = pack(tmp_path / "x.tar", {**SPLIT, "val/new/1.png": png(1)})
    with pytest.raises(DataError, match=r"1 of the 2 classes in archive .*x\.tar are unknown .*: new"):
        open_pair(path)


@both
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_processes_read_at_the_same_time(start, suffix, tmp_path):
    files = {f"{i % 2}/{i:03d}.png": png(i, (30 + i, 20)) for i in range(60)}
    images = open_images(pack(tmp_path / f"x{suffix}", files))
    here = [images.pixels(i) for i in range(60)]
    order = np.random.default_rng(0).permutation(60).tolist()
    with multiprocessing.get_context(start).Pool(3) as pool:
        for index, pixels in zip(order, pool.map_async(images.pixels, order, chunksize=1).get(120), strict=True):
            np.testing.assert_array_equal(pixels, here[index])


def test_a_set_takes_little_room_on_its_way_to_a_worker(tmp_path):
    images = open_images(pack(tmp_path / "x.tar", {f"{i:06d}.png": b"" for i in range(2000)}))
    assert len(pickle.dumps(images)) < 2000 * 100
    with pytest.raises(IndexError):
        images.pixels(2000)
    with pytest.raises(IndexError):
        images.pixels(-1)
