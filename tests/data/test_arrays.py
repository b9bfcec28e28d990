import gzip
import io
import os
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from cases import each

from patchssl.data.arrays import cifar_splits, idx_splits, read_idx
from patchssl.runtime.errors import DataError

FASHION = Path("/usr/share/datasets/fashion-mnist")


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def gray(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 28, 28), dtype=np.uint8)


def write_idx(folder: Path, *, packed: bool, counts: tuple[int, int] = (5, 3)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in zip(("train", "t10k"), counts, strict=True):
        labels = (np.arange(count) * 3 % 10).astype(np.uint8)
        for name, array in (("images-idx3", gray(count, count)), ("labels-idx1", labels)):
            path = folder / f"{prefix}-{name}-ubyte"
            path.write_bytes(idx(array))
            if packed:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
                path.unlink()


@each("packed", [False, True])
@each("place", ["", "raw", "FashionMNIST/raw"])
def test_idx_files_as_debian_and_as_torchvision_lay_them_out(packed, place, tmp_path):
    root = tmp_path / "FashionMNIST"
    write_idx(root / place, packed=packed)
    splits = idx_splits(root)
    assert splits is not None
    assert (splits.name, list(splits.readers)) == ("FashionMNIST", ["train", "val"])
    train, val = (splits.readers[split]() for split in ("train", "val"))
    np.testing.assert_array_equal(train.pixels, gray(5, 5))
    np.testing.assert_array_equal(val.pixels, gray(3, 3))
    assert train.labels is not None
    assert train.labels.tolist() == [0, 3, 6, 9, 2]
    assert train.labels.dtype == np.int64
    assert train.classes == val.classes == tuple("0123456789")  # val alone knows 0, 3 and 6


def test_torchvision_reads_the_same_from_its_own_layout(tmp_path):
    write_idx(tmp_path / "FashionMNIST/raw", packed=False)
    splits = idx_splits(tmp_path)
    assert splits is not None
    for split in ("train", "val"):
        peer = torchvision.datasets.FashionMNIST(str(tmp_path), train=split == "train")
        ours = splits.readers[split]()
        np.testing.assert_array_equal(ours.pixels, peer.data.numpy())
        np.testing.assert_array_equal(ours.labels, peer.targets.numpy())


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_debians_fashion_mnist():
    splits = idx_splits(FASHION)
    assert splits is not None
    for split, count in (("train", 6000), ("val", 1000)):
        arrays = splits.readers[split]()
        assert arrays.pixels.shape == (10 * count, 28, 28)
        assert np.bincount(arrays.labels).tolist() == [count] * 10
    # the mean and standard deviation that everybody normalizes the set with
    values = np.bincount(splits.readers["train"]().pixels.ravel()) / (60000 * 784)
    mean = (np.arange(256) / 255 * values).sum()
    assert mean == pytest.approx(0.2860, abs=1e-4)
    assert np.sqrt(((np.arange(256) / 255 - mean) ** 2 * values).sum()) == pytest.approx(0.3530, abs=1e-4)


def test_unpacked_idx_files_come_before_packed_ones(tmp_path):
    write_idx(tmp_path, packed=True)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(gray(5, 77)))
    splits = idx_splits(tmp_path)
    assert splits is not None
    np.testing.assert_array_equal(splits.readers["train"]().pixels, gray(5, 77))


def test_idx_images_without_labels(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(gray(2)))
    splits = idx_splits(tmp_path)
    assert splits is not None
    assert list(splits.readers) == ["train"]
    arrays = splits.readers["train"]()
    assert arrays.labels is None
    assert arrays.classes == ()


def test_no_idx_files_and_several_sets(tmp_path):
    assert idx_splits(tmp_path) is None
    write_idx(tmp_path / "MNIST/raw", packed=True)
    write_idx(tmp_path / "FashionMNIST/raw", packed=True)
    with pytest.raises(DataError, match=r"several sets.*FashionMNIST/raw.*MNIST/raw"):
        idx_splits(tmp_path)


@each(
    ("content", "reason"),
    [
        (b"", "no IDX file"),
        (b"hello", "no IDX file"),
        (b"\0\0\x0d\x01" + struct.pack(">I", 1) + b"\0\0\0\0", "no IDX file of bytes"),  # floats
        (b"\0\0\x08\x03\0\0", "no IDX file"),
        (idx(gray(2))[:-1], "promises 1,568 bytes of data and holds 1,567"),
        (idx(gray(2)) + b"x", "promises 1,568 bytes of data and holds more"),
        (struct.pack(">BBBBIII", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1), "damaged"),
    ],
)
def test_damaged_idx_files_are_refused(content, reason, tmp_path):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        read_idx(tmp_path / "a")


@pytest.mark.parametrize("content", [b"not gzip", gzip.compress(idx(gray(9)))[:-30]])
def test_damaged_gzip_is_refused(content, tmp_path):
    (tmp_path / "a.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.gz cannot be read"):
        read_idx(tmp_path / "a.gz")


def test_idx_images_and_labels_must_fit(tmp_path):
    write_idx(tmp_path, packed=False)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(4, dtype=np.uint8)))
    splits = idx_splits(tmp_path)
    assert splits is not None
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte holds labels of shape \(4,\) for 5 images"):
        splits.readers["train"]()


CIFAR_CLASSES = [f"kind{i}" for i in range(10)]


def cifar_batch(count: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "batch_label": f"batch {seed}",
        "labels": rng.integers(0, 10, count).tolist(),
        "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
        "filenames": [f"{i}.png" for i in range(count)],
    }


def write_cifar10(root: Path, protocol: int = 2) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for i in range(1, 6):
        (folder / f"data_batch_{i}").write_bytes(pickle.dumps(cifar_batch(4, i), protocol))
    (folder / "test_batch").write_bytes(pickle.dumps(cifar_batch(3, 6), protocol))
    meta = {"label_names": CIFAR_CLASSES, "num_cases_per_batch": 4, "num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol))
    return folder


def pack(folder: Path, name: str = "cifar-10-python.tar.gz") -> Path:
    archive = folder.parent / name
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
        tar.addfile(tarfile.TarInfo("elsewhere/test_batch"), io.BytesIO())  # not the set's
    return archive


@each("layout", ["above", "folder", "archive", "above archive", "renamed archive"])
def test_cifar10_in_every_official_form(layout, tmp_path):
    folder = write_cifar10(tmp_path)
    root = {"above": tmp_path, "folder": folder, "above archive": tmp_path}.get(layout)
    if "archive" in layout:
        archive = pack(folder, "c.tgz" if layout == "renamed archive" else "cifar-10-python.tar.gz")
        for path in folder.iterdir():
            path.unlink()
        root = root or archive
    assert root is not None
    splits = cifar_splits(root)
    assert splits is not None
    assert (splits.name, list(splits.readers)) == ("cifar10", ["train", "val"])
    train, val = (splits.readers[split]() for split in ("train", "val"))
    assert train.classes == tuple(CIFAR_CLASSES)
    assert train.pixels.shape == (20, 32, 32, 3)
    assert train.labels is not None
    assert train.labels.tolist() == [label for i in range(1, 6) for label in cifar_batch(4, i)["labels"]]
    # the format: 1024 bytes of red, then green, then blue, each row by row
    row = cifar_batch(4, 2)["data"][1]
    for y, x, channel in [(0, 0, 0), (0, 31, 1), (17, 5, 2), (31, 31, 0)]:
        assert train.pixels[5, y, x, channel] == row[1024 * channel + 32 * y + x]
    np.testing.assert_array_equal(val.labels, cifar_batch(3, 6)["labels"])
    assert not [path for path in tmp_path.rglob("data_batch*") if "archive" in layout]  # nothing unpacked


def test_torchvision_reads_the_same_cifar10(tmp_path, monkeypatch):
    write_cifar10(tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    splits = cifar_splits(tmp_path)
    assert splits is not None
    for split in ("train", "val"):
        peer = torchvision.datasets.CIFAR10(str(tmp_path), train=split == "train")
        ours = splits.readers[split]()
        np.testing.assert_array_equal(ours.pixels, peer.data)
        np.testing.assert_array_equal(ours.labels, peer.targets)
        assert ours.classes == tuple(peer.classes)


def test_cifar100(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, count in (("train", 4), ("test", 2)):
        batch = cifar_batch(count, count)
        batch["fine_labels"] = batch.pop("labels")
        (folder / name).write_bytes(pickle.dumps(batch, 2))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": CIFAR_CLASSES}, 2))
    splits = cifar_splits(tmp_path)
    assert splits is not None
    assert splits.name == "cifar100"
    np.testing.assert_array_equal(splits.readers["val"]().labels, cifar_batch(2, 2)["labels"])
    write_cifar10(tmp_path)
    with pytest.raises(DataError, match=r"several sets.*cifar-10-batches-py.*cifar-100-python"):
        cifar_splits(tmp_path)


class Command:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


@each("file", ["data_batch_3", "batches.meta"])
@each("packed", [False, True])
def test_a_cifar_file_that_runs_a_command_is_refused_and_runs_nothing(file, packed, tmp_path):
    folder = write_cifar10(tmp_path / "set")
    trace = tmp_path / "trace"
    (folder / file).write_bytes(pickle.dumps({"data": Command(trace), "label_names": Command(trace)}))
    splits = cifar_splits(pack(folder) if packed else folder)
    assert splits is not None
    with pytest.raises(DataError, match=rf"{file} is refused: the pickle asks for .*\.system"):
        splits.readers["train"]()
    assert not trace.exists()


def test_no_cifar_and_a_part_of_it(tmp_path):
    (tmp_path / "meta").write_text("a file that is called so by chance")
    assert cifar_splits(tmp_path) is None
    folder = write_cifar10(tmp_path)
    (folder / "data_batch_4").unlink()
    (folder / "test_batch").unlink()
    splits = cifar_splits(tmp_path)
    assert splits is not None
    assert list(splits.readers) == ["train"]
    with pytest.raises(DataError, match=r"lacks data_batch_4: the set is not complete"):
        splits.readers["train"]()


@each(
    ("change", "reason"),
    [
        ({"data": np.zeros((3, 3071), np.uint8)}, "no rows of 3072 bytes"),
        ({"data": np.zeros((3, 3072), np.float32)}, "no rows of 3072 bytes"),
        ({"data": "x"}, "no rows of 3072 bytes"),
        ({"labels": [0, 1]}, "2 labels for 3 images"),
        ({"labels": [0, 1, 10]}, "labels outside 0 to 9"),
        ({"labels": ["a", "b", "c"]}, "3 labels for 3 images|labels"),
    ],
)
def test_damaged_cifar_batches_are_refused(change, reason, tmp_path):
    folder = write_cifar10(tmp_path)
    (folder / "test_batch").write_bytes(pickle.dumps(cifar_batch(3, 6) | change))
    splits = cifar_splits(tmp_path)
    assert splits is not None
    with pytest.raises(DataError, match=f"test_batch holds.*{reason}"):
        splits.readers["val"]()


def test_a_pickle_of_something_else_is_refused(tmp_path):
    folder = write_cifar10(tmp_path)
    (folder / "test_batch").write_bytes(pickle.dumps([1, 2]))
    splits = cifar_splits(tmp_path)
    assert splits is not None
    with pytest.raises(DataError, match="test_batch has no 'data'"):
        splits.readers["val"]()


def test_archives_that_are_damaged_or_hold_something_else(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"archive .* cannot be read"):
        cifar_splits(tmp_path / "a.tar.gz")
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("readme"), io.BytesIO())
    assert cifar_splits(tmp_path / "b.tar.gz") is None
    archive = pack(write_cifar10(tmp_path))
    archive.write_bytes(archive.read_bytes()[:-2000])
    splits = cifar_splits(archive)
    assert splits is not None
    with pytest.raises(DataError, match=r"archive .* cannot be read"):
        splits.readers["train"]()


def test_an_idx_file_without_images_of_impossible_sizes_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(struct.pack(">BBBBIII", 0, 0, 8, 3, 0, 2**32 - 1, 2**32 - 1))
    with pytest.raises(DataError, match="a cannot be read: array is too big"):
        read_idx(tmp_path / "a")
