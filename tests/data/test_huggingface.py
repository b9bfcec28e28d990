"""Sets of the library `datasets`, made here, offline; the library itself says what they hold."""

import io
import multiprocessing
import pickle
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cases import each
from packing import png
from PIL import Image

from patchssl.data.open import absolute_name, open_images, open_pair, split_names
from patchssl.data.unreadable import find_unreadable
from patchssl.runtime.errors import DataError, UnreadableImage, UsageError

NAMES = ["cat", "dog", "fox"]
FEATURES = datasets.Features({"id": datasets.Value("int64"), "img": datasets.Image(),
                              "label": datasets.ClassLabel(names=NAMES)})


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Converted files go to a folder of the test's, in silence."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("hf")))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def table(count, labels=None, features=FEATURES):
    rows = {"id": list(range(count)), "img": [{"bytes": png(i, (4, 5 + i % 3)), "path": None} for i in range(count)],
            "label": [i % 3 for i in range(count)] if labels is None else labels}
    return datasets.Dataset.from_dict(rows, features=features)


def check(images, expected):
    """Same pixels and labels as the library hands out."""
    assert len(images) == len(expected)
    for index, row in enumerate(expected):
        np.testing.assert_array_equal(images.pixels(index), np.asarray(row["img"].convert("RGB")))
        assert images.labels[index] == row["label"]


def test_a_saved_set(tmp_path):
    whole = table(12)
    whole.save_to_disk(tmp_path / "pets")
    images = open_images(tmp_path / "pets")
    assert (images.name, images.split, images.classes) == ("pets", "all", tuple(NAMES))
    assert images.describe() == f"saved dataset {tmp_path}/pets: 12 images in 3 classes"
    check(images, whole)
    part = images.subset([7, 2])
    assert (part.item_name(0), part.labels.tolist()) == ("row 00000007", [1, 2])
    np.testing.assert_array_equal(part.pixels(1), images.pixels(2))
    with pytest.raises(IndexError):
        part.pixels(2)


@each("val", ["val", "validation", "test"])
def test_saved_splits(val, tmp_path):
    parts = {"train": table(9), val: table(4)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "pets")
    assert split_names(tmp_path / "pets") == ("train", "val")
    for images, expected in zip(open_pair(tmp_path / "pets"), parts.values(), strict=True):
        check(images, expected)
        assert images.name == "pets"
    assert open_images(tmp_path / "pets/train").name == "pets"


def test_splits_that_are_called_otherwise(tmp_path):
    datasets.DatasetDict(one=table(2)).save_to_disk(tmp_path / "one")
    assert split_names(tmp_path / "one") == ("all",)
    datasets.DatasetDict(one=table(2), two=table(2)).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match="has no split called train, val, validation or test, only one, two; choose"):
        open_images(tmp_path / "two")
    assert len(open_images(tmp_path / "two/one")) == 2


@pytest.mark.parametrize("below", ["", "data/"])
def test_parquet_files(below, tmp_path):
    parts = {"train": table(9), "test": table(4)}
    (tmp_path / "pets" / below).mkdir(parents=True)
    for split, part in parts.items():
        part.to_parquet(tmp_path / f"pets/{below}{split}-00000-of-00001.parquet")
    train, val = open_pair(tmp_path / "pets")
    check(train, parts["train"])
    check(val, parts["test"])
    assert (train.name, val.name, train.classes) == ("pets", "pets", tuple(NAMES))
    pattern = f"{tmp_path}/pets/{below}train-{{00000..00000}}-of-00001.parquet"
    assert open_images(pattern).fingerprint == train.fingerprint


def test_parquet_of_other_programs(tmp_path):
    """Without the library's own notes on columns, bytes are bytes and labels are numbers or words."""
    rows = {"image": [{"bytes": png(i), "path": f"{i}.png"} for i in range(3)], "label": [2, 0, 2]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    images = open_images(tmp_path / "a.parquet")
    assert (images.classes, images.labels.tolist()) == (("0", "1", "2"), [2, 0, 2])
    pq.write_table(pa.table({"picture": [png(i) for i in range(3)], "label": ["b", "a", "b"]}), tmp_path / "b.parquet")
    images = open_images(tmp_path / "b.parquet")
    assert (images.classes, images.labels.tolist()) == (("a", "b"), [1, 0, 1])
    assert [int(images.pixels(i)[0, 0, 0]) for i in range(3)] == [0, 1, 2]


def test_fingerprints_depend_on_images_and_labels_alone(tmp_path):
    table(9).save_to_disk(tmp_path / "a")
    table(9).to_parquet(tmp_path / "b.parquet")
    table(9, [0] * 9).save_to_disk(tmp_path / "c")
    prints = [open_images(tmp_path / name).fingerprint for name in ("a", "b.parquet", "c")]
    assert prints[0] == prints[1] != prints[2]
    assert open_images(tmp_path / "a", allow_truncated=True).fingerprint != prints[0]
    images = open_images(tmp_path / "a")
    assert images.subset([3, 1]).fingerprint == images.subset([1, 3]).fingerprint != images.fingerprint


def test_images_go_through_the_same_decoder(tmp_path):
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.zeros((4, 9), dtype=np.uint8)).save(turned, "JPEG", exif=exif)
    (tmp_path / "there.png").write_bytes(png(7))
    rows = [{"bytes": turned.getvalue(), "path": None}, {"bytes": b"no image", "path": None},
            {"bytes": None, "path": str(tmp_path / "there.png")}, {"bytes": None, "path": "hf://x/1.png"}, None]
    pq.write_table(pa.table({"image": rows}), tmp_path / "set.parquet")
    images = open_images(tmp_path / "set.parquet")
    assert images.pixels(0).shape == (9, 4, 3)
    assert int(images.pixels(2)[0, 0, 0]) == 7
    reasons = [reason for _, reason in find_unreadable(images)]
    assert [name.rpartition(", ")[2] for name, _ in find_unreadable(images)] == [f"row 0000000{i}" for i in (1, 3, 4)]
    assert ["no known image format" in reasons[0], reasons[1:]] == [
        True, ["it lies at hf://x/1.png, not on this machine", "there is no image"]]
    assert images.labels is None
    assert len(images.fingerprint) == 64


def test_labels_that_are_kept_secret(tmp_path):
    datasets.DatasetDict(train=table(3), test=table(3, [-1] * 3)).save_to_disk(tmp_path / "a")
    assert open_pair(tmp_path / "a")[1].labels is None
    table(3, [0, -1, 1]).save_to_disk(tmp_path / "b")
    with pytest.raises(DataError, match="some images have no label in the column label"):
        open_images(tmp_path / "b")


@each(("columns", "message"), [
    ({"text": datasets.Value("string")}, r"has no column of images: it holds text \(Value\('string'\)\)"),
    ({"left": datasets.Image(), "right": datasets.Image()}, "has several columns of images: it holds left"),
    ({"image": datasets.Image(), "fine": datasets.ClassLabel(names=["a"]), "coarse": datasets.ClassLabel(names=["b"])},
     r"has several columns of labels, fine, coarse; choose by \?label=COLUMN"),
])
def test_columns_that_leave_a_choice(columns, message, tmp_path):
    row = {name: png_of(kind) for name, kind in columns.items()}
    whole = datasets.Dataset.from_dict({name: [value] for name, value in row.items()},
                                       features=datasets.Features(columns))
    whole.save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match=message):
        open_images(tmp_path / "set")


def png_of(kind):
    if isinstance(kind, datasets.Image):
        return {"bytes": png(1), "path": None}
    return 0 if isinstance(kind, datasets.ClassLabel) else "words"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in the hub's layout, which the library takes for the repository owner/pets."""
    folder = tmp_path / "owner/pets"
    (folder / "data").mkdir(parents=True)
    features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=NAMES),
                                  "coarse": datasets.ClassLabel(names=["pet"])})
    for split, count in {"train": 7, "test": 3}.items():
        rows = {"img": [{"bytes": png(i), "path": None} for i in range(count)], "fine": [i % 3 for i in range(count)],
                "coarse": [0] * count}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"data/{split}-00000-of-00001.parquet")
    monkeypatch.chdir(tmp_path)
    return "hf:owner/pets"


def test_a_set_of_the_hub(hub):
    assert split_names(f"{hub}?label=fine") == ("train", "val")
    train, val = open_pair(f"{hub}?label=fine")
    assert (train.name, train.classes, len(train), len(val)) == ("pets", tuple(NAMES), 7, 3)
    assert open_images(f"{hub}?label=coarse&image=img").classes == ("pet",)
    assert train.describe() == "train of hf:owner/pets: 7 train images in 3 classes"
    assert split_names(f"{hub}:test?label=fine") == ("val",)
    assert split_names(f"{hub}:train[:3]?label=fine") == ("all",)
    assert len(open_images(f"{hub}:train[:3]?label=fine")) == 3
    with pytest.raises(DataError, match="several columns of labels, fine, coarse"):
        open_images(hub)
    with pytest.raises(DataError, match="has no column other, only img, fine, coarse"):
        open_images(f"{hub}?label=other")
    with pytest.raises(DataError, match=r"hf:owner/pets:nine cannot be opened: .*nine"):
        open_images(f"{hub}:nine")
    assert absolute_name(hub) == hub


def test_a_folder_called_like_a_set_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "hf:a").mkdir()
    (tmp_path / "hf:a/1.png").write_bytes(png(1))
    monkeypatch.chdir(tmp_path)
    assert len(open_images("./hf:a")) == 1


@each("uri", ["hf:", "hf:a/b/c", "hf:../x", "hf:/etc", "hf:a/b?revision=1", "hf:a/b?x", "hf:a b"])
def test_names_that_are_refused(uri):
    with pytest.raises(UsageError, match=r"is not understood; write hf:OWNER/NAME\[:SPLIT\]"):
        open_images(uri)


def test_a_set_that_cannot_be_had():
    """The tests are offline."""
    with pytest.raises(DataError, match="hf:nobody/nothing cannot be opened: Couldn't"):
        open_images("hf:nobody/nothing")


def test_a_damaged_saved_set(tmp_path):
    table(3).save_to_disk(tmp_path / "set")
    (tmp_path / "set/state.json").write_text("{")
    with pytest.raises(DataError, match="set cannot be opened: "):
        open_images(tmp_path / "set")


def test_code_of_a_set_is_never_run(tmp_path, monkeypatch):
    folder = tmp_path / "owner/evil"
    folder.mkdir(parents=True)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="cannot be opened"):
        open_images("hf:owner/evil")
    assert not (tmp_path / "ran").exists()


def test_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"needs the library 'datasets', .* pip install 'patchssl\[datasets\]'"):
        open_images("hf:a/b")


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_images_reach_workers(start, tmp_path):
    table(20).save_to_disk(tmp_path / "set")
    images = open_images(tmp_path / "set")
    assert len(pickle.dumps(images)) < 20_000
    with multiprocessing.get_context(start).Pool(2) as pool:
        read = pool.map_async(images.pixels, range(20)).get(120)
        for here, there in zip(map(images.pixels, range(20)), read, strict=True):
            np.testing.assert_array_equal(here, there)


def test_a_file_that_is_gone_is_unreadable(tmp_path):
    rows = [{"bytes": None, "path": str(tmp_path / "gone.png")}, {"bytes": png(1), "path": None}]
    pq.write_table(pa.table({"image": rows}), tmp_path / "set.parquet")
    with pytest.raises(UnreadableImage, match=r"gone\.png cannot be read as an image: No such file"):
        open_images(tmp_path / "set.parquet").pixels(0)


def test_a_saved_test_split_beside_validation_can_be_chosen(tmp_path):
    datasets.DatasetDict(train=table(9), validation=table(4), test=table(6)).save_to_disk(tmp_path / "pets")
    val = open_images(tmp_path / "pets", "val")
    assert (len(val), val.describe().partition("; ")[2]) == (
        4, f"test beside train and validation not used: choose as in {tmp_path}/pets/{{train,test}}")
    train, other = open_pair(f"{tmp_path}/pets/{{train,test}}")
    assert (len(train), len(other), other.split, other.name) == (9, 6, "val", "pets")


def test_splits_of_the_hub_chosen_by_braces(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset",
                        lambda repo, config, split: asked.append(split) or table({"train": 9, "test": 6}[split]))
    train, other = open_pair("hf:me/pets:{train,test}")
    assert (asked, len(train), len(other), other.split) == (["train", "test"], 9, 6, "val")


@pytest.mark.parametrize("saved", [False, True])
def test_columns_of_local_tables_are_chosen_behind_the_path(saved, tmp_path):
    rows = table(5)
    shots = rows.cast_column("img", datasets.Image(decode=False))[:]["img"]
    both = rows.add_column("depth", shots, feature=rows.features["img"])
    both = both.add_column("kind", [f"k{i % 2}" for i in range(5)])
    place = tmp_path / ("saved" if saved else "x.parquet")
    if saved:
        both.save_to_disk(place)
    else:
        both.to_parquet(place)
    with pytest.raises(DataError, match=r"several columns of images.*choose by \?image=COLUMN behind the name or path"):
        open_images(place)
    images = open_images(f"{place}?image=depth&label=kind")
    assert (images.column, images.classes, images.labels.tolist()) == ("depth", ("k0", "k1"), [0, 1, 0, 1, 0])
    if not saved:
        (tmp_path / "val.parquet").write_bytes(place.read_bytes())
        place.rename(tmp_path / "train.parquet")
        place = f"{tmp_path}/{{train,val}}.parquet"
        assert [images.column for images in open_pair(f"{place}?image=depth")] == ["depth", "depth"]
    with pytest.raises(UsageError, match=r"'\?column=depth' behind .* is not understood"):
        open_images(f"{place}?column=depth")
    with pytest.raises(DataError, match="has no column nothing, only"):
        open_images(f"{place}?image=depth&label=nothing")
