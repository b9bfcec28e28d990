"""Sets that timm's factory opens, in torchvision's layouts, made here."""

import gzip
import pickle
import struct

import numpy as np
import pytest
import torchvision
from cases import each
from packing import png, unpack
from timm.data import create_dataset

from patchssl.data.open import absolute_name, open_images, open_pair, split_names
from patchssl.runtime.errors import DataError, UsageError


@pytest.fixture
def fashion(tmp_path):
    """Fashion-MNIST's files with 3 + 2 images."""
    folder = tmp_path / "FashionMNIST/raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, count in {"train": 3, "t10k": 2}.items():
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">BBBBIII", 0, 0, 8, 3, count, 28, 28)
                                                             + pixels.tobytes())
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, count)
                                                             + bytes(range(9, 9 - count, -1)))
        for file in folder.glob("*ubyte"):
            file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    return tmp_path


def test_arrays_as_timm_hands_them_out(fashion):
    uri = f"timm:torch/fashion_mnist?root={fashion}"
    assert split_names(uri) == ("train", "val")
    for images, split in zip(open_pair(uri), ("train", "validation"), strict=True):
        expected = create_dataset("torch/fashion_mnist", root=str(fashion), split=split)
        assert len(images) == len(expected)
        for index, (image, label) in enumerate(expected):
            np.testing.assert_array_equal(images.pixels(index), np.asarray(image.convert("RGB")))
            assert images.labels[index] == label
    assert (images.name, images.classes[9], images.split) == ("fashion_mnist", "Ankle boot", "val")
    assert images.describe() == f"timm:torch/fashion_mnist in {fashion} (28 x 28 px): 2 val images in 10 classes"


def test_cifar(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {"data": np.arange(6144, dtype=np.uint8).reshape(2, 3072), "labels": [1, 0]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat", "dog"]}))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    train, val = open_pair(f"timm:torch/cifar10?root={tmp_path}")
    own = open_images(tmp_path, "val")
    assert (len(train), val.classes, val.labels.tolist()) == (10, own.classes, own.labels.tolist())
    for index in range(2):
        np.testing.assert_array_equal(val.pixels(index), own.pixels(index))


def test_files_go_through_our_decoder(tmp_path, monkeypatch):
    """ImageNet and Places365 list files: they are read like any file."""
    unpack(tmp_path, {"train/n1/a.png": png(1), "train/n2/b.png": png(2), "val/n2/c.png": b"no image"})

    class Listed:
        def __init__(self, root, split, **_):
            self.samples = [(f"{root}/{path.relative_to(root)}", int(path.parent.name[1]) - 1)
                            for path in sorted((tmp_path / split).rglob("*.png"))]
            self.classes = [("tench", "fish"), ("shark",)]

    monkeypatch.setattr("timm.data.dataset_factory.ImageNet", Listed)
    train, val = open_pair(f"timm:torch/imagenet?root={tmp_path}")
    assert (train.classes, train.labels.tolist(), train.item_name(1)) == (("tench, fish", "shark"), [0, 1],
                                                                         "train/n2/b.png")
    assert int(train.pixels(1)[0, 0, 0]) == 2
    assert val.labels.tolist() == [1]
    with pytest.raises(DataError, match=r"val/n2/c\.png cannot be read as an image: no known image format"):
        val.pixels(0)


@each("name", ["cifar10", "mnist", "qmnist", "places365", "inaturalist", "imagenet"])
def test_nothing_is_downloaded_unasked(name, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("asked the network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(DataError, match=rf"train images of timm:torch/{name}\?root=.* cannot be opened: .*&download=1"):
        open_images(f"timm:torch/{name}?root={tmp_path}")
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_download_is_passed_on_when_asked_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("timm.data.create_dataset", lambda *args, **kwargs: asked.append(kwargs) or 1 / 0)
    with pytest.raises(DataError, match=r"cannot be opened: division by zero$"):
        open_images(f"timm:torch/cifar10?root={tmp_path}&download=1", "val")
    assert asked == [{"root": str(tmp_path), "download": True, "split": "val"}]


@each(("uri", "message"), [
    ("timm:tfds/cifar10?root=x", "timm reads tfds/ as a stream only, .*export it once"),
    ("timm:wds/x?root=x", "timm reads wds/ as a stream only, .*name the shards themselves"),
    ("timm:hfids/a/b", "timm reads hfids/ as a stream only, .*name it as hf:OWNER/NAME"),
    ("timm:torch/cifar10", "does not say where the set lies: write timm:torch/NAME"),
    ("timm:torch/cifar10?root=", "does not say where"),
    ("timm:torch/cifar10?root=x&download=yes", "download=yes in .* is neither 0 nor 1"),
    ("timm:torch/cifar10?root=x&split=train", "is not understood"),
    ("timm:torch/image_folder?root=x", "name the folder itself"),
    ("timm:", "is not understood"),
    ("timm:cifar10", "is not understood"),
    ("timm:vit_small_patch16_224", "is not understood"),
])
def test_names_that_are_refused(uri, message):
    with pytest.raises(UsageError, match=message):
        open_images(uri)


def test_a_set_that_torchvision_does_not_know(tmp_path):
    with pytest.raises(DataError, match="Unknown torchvision dataset cifar11"):
        open_images(f"timm:torch/cifar11?root={tmp_path}")


def test_hfds_is_what_hf_is():
    with pytest.raises(DataError, match="hf:nobody/nothing cannot be opened"):
        open_images("timm:hfds/nobody/nothing")


def test_the_name_means_the_same_in_another_folder(fashion, monkeypatch):
    monkeypatch.chdir(fashion.parent)
    near = f"timm:torch/fashion_mnist?root={fashion.name}&download=0"
    assert absolute_name(near) == f"timm:torch/fashion_mnist?root={fashion}&download=0"
    assert open_images(near).fingerprint == open_images(absolute_name(near)).fingerprint
