import collections
import io
import json

import numpy as np
import pytest
from cases import each
from packing import pack, png, write_shards
from torch.utils.data import DataLoader, Dataset

from patchssl.data.open import open_images, open_pair, split_names
from patchssl.data.shards import are_samples, split_key
from patchssl.pretrain.dataset import EpochSampler
from patchssl.runtime.errors import DataError


@each("name", ["0001.jpg", "a/b/0001.CLS", "a.b/0001.seg.png", "0001.tar.gz", "plain", "a.b/plain",
               ".hidden", "a/.x.jpg", "__meta__.json", "__x__/1.jpg", "a__b__.jpg", "x..jpg"])
def test_names_are_taken_apart_as_by_webdataset(name):
    tariterators = pytest.importorskip("webdataset.tariterators")
    key, extension = split_key(name)
    content = io.BytesIO(pack_one(name))
    found = list(tariterators.group_by_keys({"fname": sample["fname"], "data": b"", "__url__": ""}
                                            for sample in tariterators.tar_file_iterator(content)))
    assert [(sample["__key__"], [*sample][2:]) for sample in found] == ([(key, [extension])] if key else [])


def pack_one(name):
    import tarfile

    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    return content.getvalue()


@each(("names", "answer"), [
    (["cat/1.jpg", "cat/1.cls"], True),
    (["1.jpg", "1.json", "1.txt"], True),
    (["1.jpg", "2.jpg"], False),
    (["cat/1.jpg", "cat/1.xml", "dog/2.jpg"], False),  # notes beside images in folders of classes
    (["1.jpg", "readme.txt"], False),
])
def test_what_counts_as_samples(names, answer):
    assert are_samples(names) is answer


def test_shards_written_by_webdataset(tmp_path):
    """The library's own writer and reader are the oracle: same samples, same order, same labels and pixels."""
    wds = pytest.importorskip("webdataset")
    rng = np.random.default_rng(0)
    with wds.ShardWriter(str(tmp_path / "shards-%06d.tar"), maxcount=7, verbose=0) as sink:
        for index in range(30):
            pixels = rng.integers(0, 256, (5 + index % 3, 6, 3), dtype=np.uint8)
            sink.write({"__key__": f"dir/sample{index:04d}", "png": pixels, "cls": int(index * 7 % 4),
                        "json": {"n": index}, "txt": "words"})
    pattern = f"{tmp_path}/shards-{{000000..000004}}.tar"
    expected = list(wds.WebDataset(pattern, shardshuffle=False).decode("rgb8").to_tuple("__key__", "png", "cls"))
    for data in (pattern, tmp_path):
        images = open_images(data)
        assert [images.item_name(i).partition("/")[2].removesuffix(".png") for i in range(30)] == [
            key for key, _, _ in expected]
        assert images.labels.tolist() == [label for _, _, label in expected]
        assert images.classes == ("0", "1", "2", "3")
        for index, (_, pixels, _) in enumerate(expected):
            np.testing.assert_array_equal(images.pixels(index), pixels)
        assert images.describe() == (f"5 shards in {tmp_path}: 30 images in 4 classes; skipped 60 files with other "
                                     "extensions (.json 30, .txt 30)")


@each("names", [("train-", "val-"), ("set-train-", "set-validation-"), ("train/", "val/")])
def test_splits_of_shards(names, tmp_path):
    write_shards(tmp_path / "set", 10, 4, names[0])
    write_shards(tmp_path / "set", 4, 4, names[1], classes=2)
    assert split_names(tmp_path / "set") == ("train", "val")
    train, val = open_pair(tmp_path / "set")
    assert (train.name, val.name, len(train), len(val)) == ("set", "set", 10, 4)
    assert val.classes == ("0", "1", "2")
    assert val.labels.tolist() == [0, 1, 0, 1]
    pattern = f"{tmp_path}/set/{{{names[0]}{{000000..000002}},{names[1]}000000}}.tar"
    assert [images.fingerprint for images in open_pair(pattern)] == [train.fingerprint, val.fingerprint]


def test_a_class_that_only_val_has(tmp_path):
    write_shards(tmp_path, 10, 4, "train-")
    write_shards(tmp_path, 10, 4, "val-", classes=5)
    with pytest.raises(DataError, match=r"2 of the 5 classes in 3 shards in .*: 3, 4"):
        open_pair(tmp_path)


def test_the_fingerprint_is_of_the_samples_not_of_the_shards(tmp_path):
    write_shards(tmp_path / "a", 20, 5)
    write_shards(tmp_path / "b", 20, 7)
    write_shards(tmp_path / "c", 20, 5, classes=2)
    prints = [open_images(tmp_path / name).fingerprint for name in "abc"]
    assert prints[0] == prints[1] != prints[2]


def test_the_same_key_in_two_shards_is_two_samples(tmp_path):
    for shard in range(2):
        pack(tmp_path / f"{shard}.tar", {"0.png": png(shard), "0.cls": str(shard).encode()})
    images = open_images(tmp_path)
    assert [images.item_name(i) for i in range(2)] == ["0.tar/0.png", "1.tar/0.png"]
    assert [int(images.pixels(i)[0, 0, 0]) for i in range(2)] == images.labels.tolist() == [0, 1]


def test_of_several_images_in_a_sample_one_is_chosen(tmp_path):
    path = pack(tmp_path / "x.tar", {"1.seg.png": png(9), "1.png": png(1), "1.bmp": png(8), "1.cls": b" 3\n"})
    images = open_images(path)
    assert (len(images), images.item_name(0), images.labels.tolist()) == (1, "1.png", [3])


def test_labels_beside_dotted_names_in_folders_are_not_passed_over(tmp_path):
    files = {"x/photo.1.png": png(1), "x/photo.1.cls": b"7", "y/photo.2.png": png(2), "y/photo.2.cls": b"3"}
    assert open_images(pack(tmp_path / "x.tar", files)).labels.tolist() == [7, 3]


def test_names_as_labels(tmp_path):
    path = pack(tmp_path / "x.tar", {"1.png": png(1), "1.cls": b"dog", "2.png": png(2), "2.cls": b"cat"})
    images = open_images(path)
    assert (images.classes, images.labels.tolist()) == (("cat", "dog"), [1, 0])


def test_shards_without_labels(tmp_path):
    path = pack(tmp_path / "x.tar", {"1.png": png(1), "1.json": json.dumps({"caption": "a cat"}).encode()})
    assert open_images(path).labels is None


@each("suffix", ["tar", "zip"])
@each(("about", "classes", "labels"), [
    ([{"label": 2}, {"label": 0}], ("0", "1", "2"), [2, 0]),
    ([{"label": "dog", "cls": 7}, {"label": "cat", "cls": 8}], ("cat", "dog"), [1, 0]),
    ([{"caption": "x", "class_name": "dog"}, {"class_name": "cat"}], ("cat", "dog"), [1, 0]),
])
def test_labels_in_json(suffix, about, classes, labels, tmp_path):
    files = {}
    for number, held in enumerate(about):
        files |= {f"{number}.png": png(number), f"{number}.json": json.dumps(held).encode()}
    images = open_images(pack(tmp_path / f"x.{suffix}", files))
    assert (images.classes, images.labels.tolist()) == (classes, labels)
    assert images.others == {}


def test_a_label_of_its_own_comes_before_that_in_json(tmp_path):
    files = {"1.png": png(1), "1.json": b'{"label": 5}', "1.cls": b"1", "2.png": png(2), "2.cls": b"0"}
    images = open_images(pack(tmp_path / "x.tar", files))
    assert images.labels.tolist() == [1, 0]
    assert images.others == {".json": 1}


@each("held", [b"[" * 60_000, b"{", b"\xff", b'{"label": true}', b'{"label": [1]}', b'{"label": null}', b"3",
               b'{"label": "' + b"x" * 70_000 + b'"}'])
def test_json_that_holds_no_label_gives_none(held, tmp_path):
    assert open_images(pack(tmp_path / "x.tar", {"1.png": png(1), "1.json": held})).labels is None


def test_some_labels_in_json_and_some_nowhere(tmp_path):
    files = {"1.png": png(1), "1.json": b'{"label": 0}', "2.png": png(2), "2.json": b"{}"}
    with pytest.raises(DataError, match=r"1 of 2 samples have no label \(.cls, or .json with a field .*\): 2\.png"):
        open_images(pack(tmp_path / "x.tar", files))


def test_keys_with_dots(tmp_path):
    """WebDataset itself takes photo.2023.jpg for the part 2023.jpg of sample photo, which has no image then."""
    files = {"photo.2023.jpg": png(1), "photo.2023.cls": b"1", "photo.2024.jpg": png(2), "photo.2024.cls": b"0",
             "plain.png": png(3), "plain.cls": b"2", "plain.seg.png": png(9)}
    images = open_images(pack(tmp_path / "x.tar", files))
    assert [images.item_name(i) for i in range(3)] == ["photo.2023.jpg", "photo.2024.jpg", "plain.png"]
    assert images.labels.tolist() == [1, 0, 2]
    assert images.others == {".seg.png": 1}


@each(("files", "message"), [
    ({"1.png": b"", "1.cls": b"0", "2.png": b""}, r"1 of 2 samples have no label .*: 2\.png"),
    ({"1.png": b"", "1.cls": b"0", "2.npy": b"", "2.cls": b"0"}, r"1 samples have a \.cls and no image: 2; images are"),
    ({"1.png": b"", "1.cls": b"0", "1.PNG": b""}, r"sample 1 has two members \.png"),
    ({"1.png": b"", "1.cls": b"-1"}, r"holds the label '-1'"),
    ({"1.png": b"", "1.cls": b""}, r"holds the label ''"),
])
def test_shards_that_are_refused(files, message, tmp_path):
    with pytest.raises(DataError, match=message):
        open_images(pack(tmp_path / "x.tar", files))


def test_missing_and_damaged_shards_are_named(tmp_path):
    paths = write_shards(tmp_path, 20, 5)
    with pytest.raises(DataError, match=r"1 of 5 files are not there:\n  .*/shards-000004\.tar$"):
        open_images(f"{tmp_path}/shards-{{000000..000004}}.tar")
    paths[2].write_bytes(paths[2].read_bytes()[:3000])
    with pytest.raises(DataError, match=r"the archive .*/shards-000002\.tar is"):
        open_images(f"{tmp_path}/shards-{{000000..000003}}.tar")


class Grays(Dataset):
    """What a training set does with the sampler's items: (epoch, index, batch) to (epoch, index, gray)."""

    def __init__(self, images):
        self.images = images

    def __getitem__(self, item):
        epoch, index, _ = item
        return epoch, index, int(self.images.pixels(index)[0, 0, 0])


@each("workers", [0, 2])
@each("ranks", [1, 3])
def test_every_sample_once_per_epoch_over_ranks_and_workers(ranks, workers, tmp_path):
    write_shards(tmp_path, 60, 7)
    images = open_images(tmp_path)
    seen = collections.Counter()
    for rank in range(ranks):
        sampler = EpochSampler(len(images), 6, epochs=2, seed=3, rank=rank, world_size=ranks)
        for batch in DataLoader(Grays(images), batch_sampler=sampler, num_workers=workers, collate_fn=list):
            for epoch, index, gray in batch:
                assert gray == index
                seen[epoch, index] += 1
    assert seen == {(epoch, index): 1 for epoch in range(2) for index in range(60)}


def test_an_epoch_taken_up_in_its_middle_goes_on_as_it_would_have(tmp_path):
    write_shards(tmp_path, 30, 7)
    images = open_images(tmp_path)

    def grays(start_step):
        sampler = EpochSampler(len(images), 5, epochs=2, seed=3, start_step=start_step)
        return list(DataLoader(Grays(images), batch_sampler=sampler, num_workers=2, collate_fn=list))

    assert grays(0)[7:] == grays(7)
