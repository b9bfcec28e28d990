import gzip
import multiprocessing
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from cases import each
from packing import pack, png, unpack
from PIL import Image

from patchssl.data import members, unreadable
from patchssl.data.open import absolute_name, open_images, open_pair, split_names
from patchssl.data.textures import CLASSES, textures
from patchssl.data.unreadable import UnreadableBudget, find_unreadable, raise_unreadable, require_readable
from patchssl.runtime.errors import DataError, UnreadableImage, UsageError


def write_images(root: Path, names: Sequence[str]) -> Path:
    """Small images, each of a gray of its own."""
    for value, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 6), value % 256, dtype=np.uint8)).save(root / name)
    return root


def test_a_root_with_train_and_val(tmp_path):
    root = write_images(tmp_path / "set", ["train/b/1.png", "train/a/1.png", "train/a/2.png", "val/b/9.png"])
    (root / "train/c").mkdir()  # a class without images
    assert split_names(root) == ("train", "val")
    train, val = open_pair(root)
    assert (train.name, train.split, train.classes) == ("set", "train", ("a", "b"))
    assert [train.item_name(i) for i in range(len(train))] == ["a/1.png", "a/2.png", "b/1.png"]
    assert train.labels is not None
    assert train.labels.dtype == np.int64
    assert train.labels.tolist() == [0, 0, 1]
    assert (train.pixels(2) == 0).all()
    assert train.pixels(2).shape == (4, 6, 3)
    # val shows b alone, and train's number of b is 1
    assert (val.split, val.classes) == ("val", ("a", "b"))
    assert val.labels is not None
    assert val.labels.tolist() == [1]
    assert train.describe() == f"folder {root}/train: 3 train images in 2 classes"
    assert open_images(root).fingerprint == train.fingerprint == open_images(root / "train").fingerprint
    assert open_images(root / "train").name == "set"


@each("name", ["val", "valid", "test"])
def test_names_of_the_second_split(name, tmp_path):
    write_images(tmp_path, ["train/a/1.png", "train/b/1.png", f"{name}/a/1.png", f"{name}/b/1.png"])
    assert len(open_images(tmp_path, "val")) == 2
    assert f"/{name}: 2 val images" in open_images(tmp_path, "val").describe()


def test_val_comes_before_test(tmp_path):
    write_images(tmp_path, ["train/1.png", "val/1.png", "test/1.png", "test/2.png"])
    assert len(open_images(tmp_path, "val")) == 1


def test_classes_that_only_val_has_are_named(tmp_path):
    names = [f"val/new{i:02}/1.png" for i in range(12)]
    write_images(tmp_path, ["train/a/1.png", "train/b/1.png", "val/a/1.png", *names])
    with pytest.raises(
        DataError, match=r"12 of the 13 classes in folder .*/val .*: new00, .*new09 and 2 more;"
    ):
        open_pair(tmp_path)
    assert len(open_images(tmp_path, "val").classes) == 13  # alone it is fine


def test_val_without_class_folders_has_no_labels(tmp_path):
    write_images(tmp_path, ["train/a/1.png", "train/b/1.png", "val/1.png", "val/2.png"])
    train, val = open_pair(tmp_path)
    assert train.labels is not None
    assert val.labels is None
    with pytest.raises(DataError, match="2 val images without labels"):
        val.require_labels()


def test_class_folders_themselves(tmp_path):
    root = write_images(tmp_path / "pets", ["dog/x/1.png", "dog/2.png", "cat/1.png"])
    images = open_images(root)
    assert split_names(root) == ("all",)
    assert (images.name, images.split, images.classes) == ("pets", "all", ("cat", "dog"))
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 1]  # deeper folders belong to the class on top
    assert images.describe() == f"folder {root}: 3 images in 2 classes"


@each(
    "names",
    [
        ["1.png", "2.jpg"],
        ["2020/1.png", "2021/a/2.png", "3.png"],  # a picture outside of the folders: they are no classes
        ["photos/1.png", "photos/deep/er/2.png"],  # one folder tells nothing apart
    ],
)
def test_unlabeled_trees(names, tmp_path):
    images = open_images(write_images(tmp_path, names))
    assert len(images) == len(names)
    assert images.labels is None
    assert images.classes == ()
    assert f"{len(names)} images without labels" in images.describe()


def test_unlabeled_images_in_splits(tmp_path):
    write_images(tmp_path, ["train/1.png", "train/2.png", "val/3.png"])
    train, val = open_pair(tmp_path)
    assert (len(train), len(val), train.labels, val.labels) == (2, 1, None, None)


def test_a_lone_train_folder(tmp_path):
    write_images(tmp_path / "a", ["train/x/1.png", "train/y/1.png"])
    assert split_names(tmp_path / "a") == ("train",)
    write_images(tmp_path / "b", ["train/x/1.png", "train/y/1.png", "extra/1.png"])
    assert split_names(tmp_path / "b") == ("train",)
    write_images(tmp_path / "c", ["train/1.png", "car/1.png", "bus/1.png"])  # kinds of vehicles
    assert open_images(tmp_path / "c").classes == ("bus", "car", "train")
    write_images(tmp_path / "d", ["1.png", "2.png", "test/3.png"])  # a tree that has a folder called test
    assert (split_names(tmp_path / "d"), len(open_images(tmp_path / "d"))) == (("all",), 3)


@each("names", [("train", "val"), ("train", "valid"), ("Train", "Val"), ("training", "validation"), ("train", "Test"),
                ("TRAIN", "dev"), ("train", "testing")])
def test_words_of_splits(names, tmp_path):
    """The same table for folders, an archive, lists and what the hub's library saved."""
    files = {f"{name}/{cls}/{i}.png": png(9) for name, count in zip(names, (3, 2), strict=True) for cls in "ab"
             for i in range(count)}
    unpack(tmp_path / "folder", files)
    pack(tmp_path / "a.zip", files)
    unpack(tmp_path / "lists", files)
    for name in names:
        lines = [f"{path}\t{path.split('/')[1]}\n" for path in files if path.startswith(f"{name}/")]
        (tmp_path / f"lists/{name}.txt").write_text("".join(lines))
    (tmp_path / "lists" / names[0]).rename(tmp_path / "lists/images")  # a folder of that name would come before lists
    for list_file in (tmp_path / "lists").glob("*.txt"):
        list_file.write_text(list_file.read_text().replace(f"{names[0]}/", "images/"))
    for data in ("folder", "a.zip", "lists"):
        train, val = open_pair(tmp_path / data)
        assert (len(train), len(val), train.classes, val.classes) == (6, 4, ("a", "b"), ("a", "b")), data
        assert "not used" not in val.describe()
    assert open_images(tmp_path / "folder" / names[1]).name == "folder"


@each("more", [("test",), ("test", "testing"), ("dev",)])
def test_validation_comes_before_test_and_the_other_can_be_chosen(more, tmp_path):
    root = tmp_path / "set"
    names = [f"{split}/{cls}/{i}.png" for split, count in (("train", 4), ("validation", 3), (more[0], 2))
             for cls in "ab" for i in range(count)]
    write_images(root, [*names, *(f"{name}/a/1.png" for name in more[1:])])
    val = open_images(root, "val")
    unused = ", ".join(more)
    assert len(val) == 6
    assert val.describe() == (f"folder {root}/validation: 6 val images in 2 classes; {unused} beside train and "
                              f"validation not used: choose as in {root}/{{train,{more[0]}}}")
    train, other = open_pair(f"{root}/{{train,{more[0]}}}")  # what the sentence says
    assert (len(train), len(other), other.split, other.name) == (8, 4, "val", "set")
    assert train.fingerprint == open_images(root, "train").fingerprint
    assert absolute_name(f"{root}/{{train,test}}") == f"{root}/{{train,test}}"


def test_folders_chosen_by_braces_that_are_no_pair(tmp_path):
    write_images(tmp_path, ["train/1.png", "test/1.png", "val/1.png", "nest/train/train/a/1.png", "nest/test/1.png"])
    with pytest.raises(DataError, match="names 3 folders; name two"):
        open_images(f"{tmp_path}/{{train,test,val}}")
    with pytest.raises(DataError, match="is named as train and holds train images"):
        open_images(f"{tmp_path}/nest/{{train,test}}")


def test_columns_of_what_is_no_table(tmp_path):
    write_images(tmp_path / "set", ["a/1.png", "b/1.png"])
    (tmp_path / "odd?image=x").mkdir()
    write_images(tmp_path / "odd?image=x", ["a/1.png", "b/1.png"])
    assert len(open_images(f"{tmp_path}/odd?image=x")) == 2  # a folder that is called so
    with pytest.raises(DataError, match=r"set is no table, so '\?image=x' chooses nothing in it"):
        open_images(f"{tmp_path}/set?image=x")
    with pytest.raises(DataError, match=r"x\.zip is no table, so '\?image=x' chooses nothing in it"):
        open_images(f"{pack(tmp_path / 'x.zip', {'1.png': png(1)})}?image=x")


def test_two_folders_that_differ_in_case(tmp_path):
    write_images(tmp_path, ["train/a/1.png", "Train/a/1.png", "val/a/1.png"])
    with pytest.raises(DataError, match="holds Train and train, of which either may be meant; rename one"):
        open_images(tmp_path)


def test_two_names_of_val_without_train(tmp_path):
    write_images(tmp_path, ["val/a/1.png", "Test/a/1.png"])
    with pytest.raises(DataError, match="holds Test/, val/; call what to train on train/"):
        open_images(tmp_path)


def test_a_stray_image_beside_class_folders(tmp_path):
    names = ["cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"]
    plain = open_images(write_images(tmp_path / "plain", names))
    strayed = open_images(write_images(tmp_path / "stray", [*names, "preview.JPG"]))
    assert (strayed.classes, strayed.labels.tolist()) == (("cat", "dog"), [0, 0, 1, 1])
    assert strayed.fingerprint == plain.fingerprint
    assert strayed.describe().endswith("4 images in 2 classes; left out 1 image beside the 2 class folders: "
                                       "preview.JPG")
    archive = pack(tmp_path / "stray.zip", {name: (tmp_path / "stray" / name).read_bytes()
                                            for name in [*names, "preview.JPG"]})
    assert open_images(archive).labels.tolist() == [0, 0, 1, 1]
    assert open_images(archive).fingerprint == plain.fingerprint
    (tmp_path / "stray/list.txt").write_text("\n".join([*names, "preview.JPG"]))
    assert open_images(tmp_path / "stray/list.txt").labels.tolist() == [0, 0, 1, 1]


def test_strays_in_splits(tmp_path):
    files = [f"{split}/{cls}/{i}.png" for split in ("train", "val") for cls in "ab" for i in range(2)]
    write_images(tmp_path, [*files, "train/x.png", "logo.png", "val/.DS_Store.png", "val/__MACOSX/a.png",
                            "val/a/@eaDir/1.png"])
    for images in open_pair(tmp_path):
        assert (len(images), images.labels.tolist()) == (4, [0, 0, 1, 1])
        assert "left out 1 image beside them" in images.describe()
    assert "left out 1 image beside the 2 class folders: x.png" in open_images(tmp_path).describe()


def test_many_images_beside_folders_are_kept_and_said(tmp_path):
    images = open_images(write_images(tmp_path, ["a/1.png", "a/2.png", "b/1.png", "x.png", "y.png"]))
    assert (len(images), images.labels) == (5, None)
    assert "the 2 folders are not taken for classes, as 2 images lie beside them: x.png, y.png" in images.describe()


def test_a_split_that_is_missing(tmp_path):
    write_images(tmp_path / "half", ["train/a/1.png"])
    with pytest.raises(DataError, match=r"half has no val images: it has only train"):
        open_images(tmp_path / "half", "val")
    write_images(tmp_path / "whole", ["1.png"])
    with pytest.raises(
        DataError, match=r"whole has no val images: it is not split: that would be a train/ and"
    ):
        open_images(tmp_path / "whole", "val")


@pytest.mark.parametrize("name", ["textures", "textures-64"])
def test_the_embedded_set(name):
    val = open_images(name, "val")
    pixels, labels = textures("val", 64 if name.endswith("64") else 32)
    assert (val.name, val.split, val.classes) == (name, "val", CLASSES)
    np.testing.assert_array_equal(val.labels, labels)
    np.testing.assert_array_equal(val.pixels(7), pixels[7])
    side = pixels.shape[1]
    assert val.describe() == f"the embedded set {name} ({side} x {side} px): 1,500 val images in 10 classes"


def test_a_folder_called_like_the_embedded_set(tmp_path, monkeypatch):
    write_images(tmp_path, ["textures/1.png"])
    monkeypatch.chdir(tmp_path)
    assert len(open_images("./textures")) == len(open_images(Path("textures"))) == 1
    assert len(open_images("textures", "val")) == 1500


def test_idx_files(tmp_path):
    folder = tmp_path / "FashionMNIST/raw"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    for prefix in ("train", "t10k"):
        images, labels = folder / f"{prefix}-images-idx3-ubyte.gz", folder / f"{prefix}-labels-idx1-ubyte.gz"
        images.write_bytes(gzip.compress(struct.pack(">BBBBIII", 0, 0, 8, 3, 3, 28, 28) + pixels.tobytes()))
        labels.write_bytes(gzip.compress(struct.pack(">BBBBI", 0, 0, 8, 1, 3) + bytes([1, 0, 4])))
    assert split_names(tmp_path) == ("train", "val")
    train, val = open_pair(str(tmp_path))
    assert (train.name, len(train), val.split) == ("FashionMNIST", 3, "val")
    np.testing.assert_array_equal(train.pixels(1), np.stack([pixels[1]] * 3, axis=-1))
    assert val.labels is not None
    assert val.labels.tolist() == [1, 0, 4]
    assert train.describe() == f"IDX files in {tmp_path} (28 x 28 px): 3 train images in 5 classes"


def test_cifar(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    batch = {"data": np.arange(6144, dtype=np.uint8).reshape(2, 3072), "labels": [1, 0]}
    (folder / "test_batch").write_bytes(pickle.dumps(batch, 2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat", "dog"]}, 2))
    val = open_images(tmp_path)  # of the splits, val alone is there
    assert (val.name, val.split, val.classes) == ("cifar10", "val", ("cat", "dog"))
    assert val.pixels(1)[0, 0].tolist() == [batch["data"][1][i] for i in (0, 1024, 2048)]


@each("data", ["texture", "imagenet", ""])
def test_a_name_that_is_nothing(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UsageError, match=rf"no file or folder is called '{data}', and .*textures, textures-64$"
    ):
        open_images(data)


@each("data", ["./missing", "/missing/path", Path("missing")])
def test_a_path_that_is_missing(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"missing.* does not exist, and is not the name of a set: textures"):
        open_images(data)


def test_a_folder_without_images(tmp_path):
    with pytest.raises(DataError, match=rf"0 images in {tmp_path}; it holds no files at all"):
        open_images(tmp_path)
    for name in ("a.heic", "b.HEIC", "notes"):
        (tmp_path / name).touch()
    with pytest.raises(
        DataError, match=r"it holds 3 files with other extensions \(\.heic 2, no extension 1\)"
    ):
        open_images(tmp_path)


def test_a_file_instead_of_a_folder(tmp_path):
    write_images(tmp_path, ["1.png"])
    with pytest.raises(DataError, match=r"1\.png is a file; images are read from a folder"):
        open_images(tmp_path / "1.png")


def test_a_folder_one_may_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.F_OK)  # root may read everything
    with pytest.raises(DataError, match="is there, but you may not read it"):
        open_images(tmp_path)


def test_home_is_understood(tmp_path, monkeypatch):
    write_images(tmp_path / "pets", ["1.png"])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_images("~/pets")) == 1


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """600 images of which two cannot be read."""
    write_images(tmp_path, [f"{i:03}.png" for i in range(600)])
    (tmp_path / "007.png").write_text("no image")
    whole = (tmp_path / "300.png").read_bytes()
    (tmp_path / "300.png").write_bytes(whole[:50])
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_find_unreadable_finds_all_in_order(workers, damaged):
    seen: list[tuple[int, int]] = []
    bad = find_unreadable(open_images(damaged), workers, lambda done, total: seen.append((done, total)))
    assert [name for name, _ in bad] == [str(damaged / "007.png"), str(damaged / "300.png")]
    assert "no known image format" in bad[0][1]
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (600, 600)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_look_at_all_sets_lists_their_bad_files(damaged, workers):
    images = open_images(damaged)
    with pytest.raises(DataError, match=r"2 of 603 images cannot be read") as refused:
        require_readable((images.subset([0, 1, 2]), images), workers)
    assert "/007.png: no known image format" in str(refused.value)
    assert "/300.png: " in str(refused.value)
    seen: list[tuple[int, int]] = []
    require_readable((images.subset([0, 1, 2]), images.subset(range(301, 600))), workers, lambda *at: seen.append(at))
    assert seen == [(3, 302), (259, 302), (302, 302)]


def test_what_looks_whole_is_not_decoded_unless_something_else_is_bad(damaged, monkeypatch):
    inside = bytearray((damaged / "400.png").read_bytes())
    inside[45] ^= 255  # among the compressed pixels
    (damaged / "400.png").write_bytes(inside)
    (damaged / "401.png").write_bytes((damaged / "401.png").read_bytes() + b"more")
    images = open_images(damaged)
    decoded = []
    pixels = type(images).pixels
    monkeypatch.setattr(type(images), "pixels", lambda images, index: decoded.append(index) or pixels(images, index))
    require_readable([images.subset(range(301, 600))])  # it takes a pass over the pixels to find 400
    assert len(decoded) == 1  # 401
    with pytest.raises(DataError, match="3 of 600 images cannot be read") as refused:
        require_readable([images])
    assert all(f"/{name}.png: " in str(refused.value) for name in ("007", "300", "400"))


def test_a_look_into_archives(damaged, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "all.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for image in sorted(damaged.glob("*.png")):
            archive.write(image, image.name)
    images = open_images(path)
    assert [index for index in range(600) if not images.quick_check(index)] == [7, 300]
    with pytest.raises(DataError, match=r"2 of 600 images cannot be read"):
        require_readable([images])


@pytest.mark.parametrize(("kind", "packing"), [("tar", None), ("zip", zipfile.ZIP_STORED),
                                               ("zip", zipfile.ZIP_DEFLATED)])
def test_a_look_into_archives_reads_little_of_them(tmp_path, monkeypatch, kind, packing):
    content = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)).save(content, "PNG")
    whole, cut, path = content.getvalue(), content.getvalue()[:-5000], tmp_path / f"x.{kind}"
    parts = {"a.png": whole, "b.png": cut, "c.png": b"nothing" * 3000, "d.png": b""}
    if packing is None:
        with tarfile.open(path, "w") as tar:
            for name, part in parts.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(part)
                tar.addfile(entry, BytesIO(part))
    else:
        with zipfile.ZipFile(path, "w", packing) as archive:
            for name, part in parts.items():
                archive.writestr(name, part)
    images, read = open_images(path), []
    real = members._read_at
    monkeypatch.setattr(members, "_read_at", lambda *about: read.append(about[2]) or real(*about))
    deflated = packing == zipfile.ZIP_DEFLATED  # the end of such a member costs unpacking it
    assert [images.quick_check(index) for index in range(4)] == [True, deflated, False, False]
    assert sum(read) < 3000 < len(whole)
    assert len(find_unreadable(images)) == 3  # which decoding finds


def test_of_very_many_files_every_so_many_th_is_looked_at_and_that_is_said(damaged, monkeypatch):
    monkeypatch.setattr(unreadable, "MOST_LOOKED_AT", 101)
    images, said, looked, decoded = open_images(damaged), [], [], []
    look, pixels = type(images).quick_check, type(images).pixels
    monkeypatch.setattr(type(images), "quick_check", lambda images, at: looked.append(at) or look(images, at))
    monkeypatch.setattr(type(images), "pixels", lambda images, at: decoded.append(at) or pixels(images, at))
    with pytest.raises(DataError, match=r"1 of 100 images cannot be read[^:]*:\n[^\n]*/300.png"):
        require_readable([images], say=said.append)
    assert (looked, decoded) == (list(range(0, 600, 6)), [300])
    assert said == ["looking at one file of 6 among 600; what is damaged among the others is told at the end of the "
                    "pass that decodes them"]
    seen: list[tuple[int, int]] = []
    require_readable([images.subset(range(301, 600))], 2, lambda *at: seen.append(at), said.append)
    assert seen[-1] == (100, 100) and len(said) == 2
    require_readable([])


def test_allowed_truncated_files_are_readable(damaged):
    names = {Path(name).name for name, _ in find_unreadable(open_images(damaged, allow_truncated=True))}
    assert names == {"007.png"}


def test_arrays_need_no_check(monkeypatch):
    images = open_images("textures", "val")
    monkeypatch.setattr(type(images), "pixels", None)  # would fail if it were asked
    assert find_unreadable(images) == []


def test_raise_unreadable_lists_twenty_and_counts_the_rest():
    raise_unreadable([], total=100)
    bad = [UnreadableImage(f"{i}.png", "cut") for i in range(23)]
    with pytest.raises(DataError, match=r"23 of 1,000 images") as refused:
        raise_unreadable(bad, total=1000)
    lines = str(refused.value).splitlines()
    assert lines[1:21] == [f"  {i}.png: cut" for i in range(20)]
    assert lines[21:] == ["  and 3 more"]


@each(
    ("total", "allowed"), [(1, 0), (99, 0), (100, 1), (250, 2), (1000, 10), (1_281_167, 12_811)]
)
def test_training_may_skip_one_percent_and_not_one_image_more(total, allowed):
    budget = UnreadableBudget(total)
    for i in range(allowed):
        budget.add(f"{i}.png", "cut")
    assert budget.count == allowed
    with pytest.raises(
        DataError, match=rf"{allowed + 1:,} of {total:,} images cannot be read .*more than run\.unreadable_share allows"
    ):
        budget.add("last.png", "cut")


def test_an_image_met_again_counts_once():
    budget = UnreadableBudget(100)
    for _ in range(5):
        budget.add("1.png")
    assert budget.count == 1
    with pytest.raises(DataError, match=r"\n  1\.png\n  2\.png: cut$"):
        budget.add("2.png", "cut")


def test_images_reach_workers_that_start_anew(tmp_path):
    files = open_images(write_images(tmp_path / "set", ["a/1.png", "b/2.png"]))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for images in (files, open_images("textures", "val").subset([3, 700])):
            here = [images.pixels(i) for i in range(2)]
            np.testing.assert_array_equal(pool.map(images.pixels, range(2)), here)


def test_what_names_the_same_images_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute_name("textures") == "textures"
    assert absolute_name("hf:owner/name:train") == "hf:owner/name:train"
    assert absolute_name("pets") == absolute_name(Path("pets")) == str(tmp_path / "pets")
    assert absolute_name("s-{0..1}.tar") == f"{tmp_path}/s-{{0..1}}.tar"
    monkeypatch.setenv("HOME", "/home/me")
    assert absolute_name("~/pets") == "/home/me/pets"


def test_braces_in_the_name_of_a_folder_that_is_there(tmp_path):
    assert len(open_images(write_images(tmp_path / "{a,b}", ["1.png"]))) == 1
    assert len(open_images(str(tmp_path / "{a,b}"))) == 1


def test_lists_of_one_split_are_not_joined_silently(tmp_path):
    write_images(tmp_path, ["1.png", "2.png"])
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("1.png\n")
    with pytest.raises(DataError, match=r"a\.txt and .*b\.txt name images of one split; join them"):
        open_images(f"{tmp_path}/{{a,b}}.txt")
