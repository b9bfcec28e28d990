import gzip
import hashlib
import json
import pickle
import struct
from functools import cache
from io import BytesIO

import numpy as np
import pytest
import torchvision.datasets
from cases import each
from PIL import Image

from patchssl.runtime.errors import DataError, UsageError
from patchssl.sets import check as check_sets
from patchssl.sets import imagenet as check_imagenet
from patchssl.sets.check import CHECKS, check_set
from patchssl.sets.imagenet100 import class_list


def verdicts(report):
    return {finding.what: finding.verdict for finding in report.findings}


def finding(report, what):
    return next(found for found in report.findings if found.what == what)


@cache
def jpeg(mode="RGB", **options):
    file = BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def save(path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(**options))


# --- what is known of the official sets ---

def test_checksums_are_those_torchvision_states():
    official = torchvision.datasets.CIFAR10
    stated = dict([*official.train_list, *official.test_list, (official.meta["filename"], official.meta["md5"])])
    assert dict(check_sets.CIFAR10_MD5) == stated
    assert dict(check_sets.FASHION_MD5) == dict(torchvision.datasets.FashionMNIST.resources)


def test_numbers_of_images():
    assert sum(check_imagenet.IMAGENET.values()) == 1_331_167  # image-net.org: 1,281,167 and 50,000
    assert {name: entry[:2] for name, entry in check_sets.REVISITED.items()} == {
        "roxford5k": (4993, 70), "rparis6k": (6322, 70)}
    assert len(set(check_sets.PARIS_DAMAGED)) == 20  # 6,412 in the archives = 6,322 + 70 + 20
    assert "paris_louvre_000136.jpg" in check_sets.PARIS_DAMAGED


# --- CIFAR-10 ---

@pytest.fixture
def cifar(tmp_path, monkeypatch):
    folder = tmp_path / "cifar10" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    content = {name: name.encode() for name in check_sets.CIFAR10_MD5}
    for name, data in content.items():
        (folder / name).write_bytes(data)
    monkeypatch.setattr(check_sets, "CIFAR10_MD5", {name: hashlib.md5(data).hexdigest()
                                                    for name, data in content.items()})
    return folder


def test_cifar10_by_its_checksums(cifar, tmp_path):
    steps = []
    for place in (cifar, cifar.parent):
        report = check_set(place, progress=lambda *step: steps.append(step))
        assert (report.kind, report.ok, len(report.findings)) == ("cifar10", True, 7)
    assert steps[-1] == (7, 7)
    assert check_set(tmp_path, "cifar10").path == cifar.parent  # ROOT/NAME
    (cifar / "data_batch_3").write_bytes(b"other")
    (cifar / "test_batch").unlink()
    report = check_set(cifar)
    assert not report.ok
    wrong = {what for what, verdict in verdicts(report).items() if verdict == "problem"}
    assert wrong == {"data_batch_3", "test_batch"}
    assert "damaged, or not the official file" in finding(report, "data_batch_3").value
    assert finding(report, "test_batch").advice == "fetch it anew: patchssl data get cifar10 ROOT"


def test_another_cifar_10_is_not_the_official_one(tmp_path):
    for name in check_sets.CIFAR10_MD5:
        (tmp_path / name).write_bytes(b"x")
    assert len(check_set(tmp_path).problems) == 7


# --- Fashion-MNIST ---

def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """Packed files of the right shape with a tenth of each class."""
    folder = tmp_path / "fashion-mnist" / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    md5 = {}
    for split, count in (("train", 60_000), ("t10k", 10_000)):
        for kind, array in (("images-idx3", np.zeros((count, 28, 28), np.uint8)),
                            ("labels-idx1", (np.arange(count) % 10).astype(np.uint8))):
            path = folder / f"{split}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(idx(array), 1, mtime=0))
            md5[path.name] = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(check_sets, "FASHION_MD5", md5)
    return folder


def test_fashion_mnist_by_checksums_and_counts(fashion):
    report = check_set(fashion.parent.parent)
    assert (report.kind, report.ok, len(report.findings)) == ("fashion-mnist", True, 6)
    assert finding(report, "train").value == "60,000 x 28 x 28, 6,000 to 6,000 of a class"
    assert check_set(fashion, "fashion-mnist").ok
    (fashion / "t10k-labels-idx1-ubyte.gz").write_bytes(b"damaged")
    report = check_set(fashion, "fashion-mnist")
    assert verdicts(report)["t10k-labels-idx1-ubyte.gz"] == verdicts(report)["val"] == "problem"
    assert verdicts(report)["t10k-images-idx3-ubyte.gz"] == "ok"


def test_fashion_mnist_unpacked(fashion):
    for path in fashion.iterdir():
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    report = check_set(fashion.parent.parent)
    assert verdicts(report) == {"train": "ok", "val": "ok"}
    (fashion / "train-images-idx3-ubyte").unlink()
    assert verdicts(check_set(fashion, "fashion-mnist")) == {"train": "problem", "val": "ok"}


def test_mnist_is_not_fashion_mnist(fashion, tmp_path):
    """Its classes are not of one size."""
    labels = np.zeros(10_000, np.uint8)
    (fashion / "t10k-labels-idx1-ubyte").write_bytes(idx(labels))  # read before the packed one
    report = check_set(tmp_path, "fashion-mnist")
    assert "0 to 10,000 of a class" in finding(report, "val").value
    assert verdicts(report)["val"] == "problem"


def test_other_idx_files_are_just_images(tmp_path):
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((7, 28, 28), np.uint8)))
    report = check_set(tmp_path / "mnist")
    assert (report.kind, report.ok) == ("images", True)
    assert "7 train images without labels" in report.findings[0].value


# --- ImageNet ---

def imagenet(root, classes, train=2, val=1, **options):
    for split, count in (("train", train), ("val", val)):
        for name in classes:
            for number in range(count):
                save(root / split / name / f"{split}_{name}_{number}.JPEG", **options)
    return root


CLASSES = [f"n{number:08d}" for number in range(120)]


@pytest.fixture
def small_imagenet(monkeypatch):
    """As if ImageNet had 240 and 120 images."""
    monkeypatch.setattr(check_imagenet, "IMAGENET", {"train": 240, "val": 120})
    monkeypatch.setattr(check_imagenet, "IMAGENET_BLURRED", {"train": 238, "val": 119})
    split_findings = check_imagenet._split_findings
    monkeypatch.setattr(check_imagenet, "_split_findings", lambda root, counts, right, blurred=False: split_findings(
        root, counts, {split: (images, 120) for split, (images, _) in right.items()}, blurred))


def test_imagenet_by_its_counts(tmp_path, small_imagenet):
    steps = []
    report = check_set(imagenet(tmp_path, CLASSES, quality=90), progress=lambda *step: steps.append(step))
    assert (report.kind, report.ok) == ("imagenet", True)
    assert finding(report, "train").value == "240 images in 120 classes"
    assert steps[-1] == (240, 240)
    (tmp_path / "val" / CLASSES[5] / f"val_{CLASSES[5]}_0.JPEG").unlink()
    report = check_set(tmp_path)
    assert verdicts(report)["val"] == "problem" and verdicts(report)["train"] == "ok"
    assert finding(report, "val").value == "119 images in 120 classes instead of 120 in 120"
    assert finding(report, "val").advice == f"no images in {CLASSES[5]}"


def test_the_real_counts_of_imagenet(tmp_path):
    report = check_set(imagenet(tmp_path, CLASSES[:101], train=1), "imagenet")
    assert finding(report, "train").value == "101 images in 101 classes instead of 1,281,167 in 1,000"
    assert "101 images in 101 classes instead of 50,000 in 1,000" in finding(report, "val").value
    assert "not 50 images in n00000000 (1)" in finding(report, "val").advice


def test_as_many_images_as_the_release_with_blurred_faces(tmp_path, small_imagenet):
    imagenet(tmp_path, CLASSES)
    for split, count in (("train", 2), ("val", 1)):
        for path in sorted((tmp_path / split).rglob("*.JPEG"))[:count]:
            path.unlink()
    report = check_set(tmp_path)
    assert report.ok
    assert verdicts(report)["counts"] == "note"


@each(("options", "words", "verdict"), [
    ({}, "blurred, by how the images were saved", "note"),
    ({"quality": 90}, "cannot be told", "note"),
    ({"quality": 75, "mode": "L"}, "as first published: 120 of 120 images", "ok"),
    ({"quality": 75, "mode": "CMYK"}, "as first published", "ok"),
])
def test_which_release_of_imagenet(tmp_path, options, words, verdict):
    imagenet(tmp_path, CLASSES, train=1, **options)
    found = finding(check_set(tmp_path), "faces")
    assert words in found.value
    assert found.verdict == verdict


def test_one_gray_image_tells_the_first_release_and_few_images_tell_nothing(tmp_path):
    imagenet(tmp_path, CLASSES, train=1)
    save(tmp_path / "val" / CLASSES[80] / f"val_{CLASSES[80]}_0.JPEG", mode="L")
    assert "1 of 120 images are no RGB JPEG" in finding(check_set(tmp_path), "faces").value
    imagenet(tmp_path / "few", CLASSES[:99], train=1)
    assert "cannot be told" in finding(check_set(tmp_path / "few"), "faces").value


def test_images_that_cannot_be_opened_are_counted(tmp_path):
    imagenet(tmp_path, CLASSES, train=1)
    (tmp_path / "val" / CLASSES[0] / f"val_{CLASSES[0]}_0.JPEG").write_bytes(b"")
    (tmp_path / "val" / CLASSES[1] / f"val_{CLASSES[1]}_0.JPEG").write_bytes(b"%!PS-Adobe-3.0 EPSF")
    assert finding(check_set(tmp_path), "headers").value.startswith("2 of 120 images looked at")


def test_usual_mistakes_with_imagenet_are_named(tmp_path):
    imagenet(tmp_path, CLASSES, train=1)
    (tmp_path / "train" / "n01440764.tar").touch()
    save(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG")
    report = check_set(tmp_path)
    assert "1 archives such as n01440764.tar are not unpacked" in finding(report, "train").advice
    assert "1 images lie right in" in finding(report, "val").advice
    (tmp_path / "val" / CLASSES[0]).rename(tmp_path / "val" / "n99999999")
    texts = check_set(tmp_path).problems
    assert any("train: without 1 classes of val: n99999999" in text for text in texts)
    assert any(f"val: without 1 classes of train: {CLASSES[0]}" in text for text in texts)


def test_a_split_that_is_not_there(tmp_path):
    imagenet(tmp_path, CLASSES, train=0)
    report = check_set(tmp_path)
    assert "no folder" in finding(report, "train").value
    assert "image-net.org" in finding(report, "train").advice


@pytest.mark.parametrize("name", ["cmc", "kaggle"])
def test_imagenet_100_by_its_list(tmp_path, monkeypatch, name):
    monkeypatch.setattr(check_imagenet, "IMAGENET100_TRAIN", {name: 100})
    imagenet(tmp_path, class_list(name), train=1, val=50)
    report = check_set(tmp_path)
    assert (report.kind, report.ok) == ("imagenet100", True)
    assert finding(report, "classes").value == f"the 100 of the list {name}"
    assert finding(report, "val").value == "5,000 images in 100 classes"


def test_imagenet_100_of_another_list(tmp_path):
    imagenet(tmp_path, [*class_list()[:60], "n99999999"], train=1, val=50)
    found = finding(check_set(tmp_path), "classes")
    assert found.value == "61; 60 of them are in the list cmc"
    assert found.verdict == "note"


def imagenette(root, left_out=None):
    """The layout of imagenette2-160.tgz, with empty files for images."""
    for number, name in enumerate(sorted(check_imagenet.IMAGENETTE_CLASSES)):
        for split, right in check_imagenet.IMAGENETTE.items():
            for image in range(right // 10 + (number < right % 10)):
                if (path := root / split / name / f"{name}_{split}_{image}.JPEG").name != left_out:
                    save_empty(path)
    return root


def test_imagenette_by_its_classes_and_counts(tmp_path):
    assert set(torchvision.datasets.Imagenette._WNID_TO_CLASS) == check_imagenet.IMAGENETTE_CLASSES
    report = check_set(imagenette(tmp_path))
    assert (report.kind, report.ok) == ("imagenette", True)
    assert [found.value for found in report.findings] == ["9,469 images in 10 classes", "3,925 images in 10 classes"]


def test_an_incomplete_imagenette_is_told(tmp_path):
    report = check_set(imagenette(tmp_path, left_out="n01440764_val_0.JPEG"))
    assert report.problems == ["val: 3,924 images in 10 classes instead of 3,925 in the ten of Imagenette "
                               "(fetch it anew: patchssl data get imagenette ROOT)"]


def test_other_tens_of_classes_are_not_imagenette(tmp_path):
    assert check_set(imagenet(tmp_path, CLASSES[:10])).kind == "imagenet100"
    assert not check_set(tmp_path, "imagenette").ok


# --- Copydays ---

@pytest.fixture
def copydays(tmp_path):
    root = tmp_path / "copydays"
    for block in ("original", *(f"jpegqual/{q}" for q in (3, 5, 8, 10, 15, 20, 30, 50, 75)),
                  *(f"crops/{p}" for p in (10, 15, 20, 30, 40, 50, 60, 70, 80))):
        for number in range(157):
            save_empty(root / block / f"{200000 + 100 * number}.jpg")
    for number in range(229):
        save_empty(root / "strong" / f"{200000 + 100 * (number % 157) + 1 + number // 157}.jpg")
    return root


def save_empty(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_copydays_by_its_blocks(copydays):
    report = check_set(copydays)
    assert (report.kind, report.ok) == ("copydays", True)
    assert "157 originals, 3,055 copies" in finding(report, "blocks").value
    assert verdicts(report) == {"blocks": "ok", "distractors": "note", "whitening": "note"}
    save_empty(copydays / "distractors" / "deep" / "a.jpg")
    assert finding(check_set(copydays), "distractors").value == "1 images"
    (copydays / "crops" / "40" / "200300.jpg").unlink()
    report = check_set(copydays)
    assert verdicts(report)["blocks"] == "problem"
    assert "crops/40 holds 156 of 157 (without 200300)" in report.problems[0]


def test_a_made_set_is_told_from_copydays(copydays):
    for path in list(copydays.rglob("2*.jpg")):
        path.rename(path.with_name("3" + path.name[1:]))
    report = check_set(copydays)
    assert report.ok and verdicts(report)["blocks"] == "note"


# --- revisited Oxford and Paris ---

@pytest.fixture
def revisited(tmp_path, monkeypatch):
    """A database of three and one query, taken for roxford5k."""
    root = tmp_path / "data" / "roxford5k"
    entry = {"bbx": [0.0, 0.0, 5.0, 5.0], "easy": [0], "hard": [1], "junk": []}
    truth = {"imlist": ["a", "b", "c"], "qimlist": ["q"], "gnd": [entry]}
    for name in ("a", "b", "c", "q"):
        save_empty(root / "jpg" / f"{name}.jpg")
    path = root / "gnd_roxford5k.pkl"
    path.write_bytes(pickle.dumps(truth))
    known = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(check_sets, "REVISITED", {"roxford5k": (3, 1, known), "rparis6k": (6322, 70, "0" * 64)})
    return root


def test_roxford5k_by_its_ground_truth(revisited, tmp_path):
    for report in (check_set(revisited), check_set(tmp_path / "data", "roxford5k")):
        assert (report.kind, report.ok, report.path) == ("roxford5k", True, revisited)
        assert finding(report, "gnd_roxford5k.pkl").value == (
            "3 images, 1 queries, byte for byte the file that others use")
        assert finding(report, "images").value.startswith("4 of 4 in ")
    (revisited / "jpg" / "b.jpg").unlink()
    (revisited / "jpg" / "q.jpg").unlink()
    report = check_set(revisited)
    assert "2 of 4 in" in finding(report, "images").value and finding(report, "images").value.endswith("b.jpg, q.jpg")
    assert report.problems


def test_a_set_in_the_datasets_folder_of_the_official_code(revisited):
    revisited.parent.rename(revisited.parent.with_name("datasets"))
    root = revisited.parent.parent
    assert check_set(root, "roxford5k").path == root / "datasets" / "roxford5k"


def test_another_ground_truth(revisited, monkeypatch):
    path = revisited / "gnd_roxford5k.pkl"
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()), protocol=2))
    report = check_set(revisited)
    assert report.ok and verdicts(report)["gnd_roxford5k.pkl"] == "note"
    monkeypatch.setattr(check_sets, "REVISITED", {"roxford5k": (4993, 70, "0" * 64)})
    assert "3 images, 1 queries instead of 4,993 and 70" in check_set(revisited).problems[0]
    path.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert "refused: the pickle asks for os.system" in check_set(revisited).problems[0]


def test_the_wrong_one_of_two_sets(revisited):
    report = check_set(revisited, "rparis6k")
    assert not report.ok
    assert "gnd_rparis6k.pkl is not a file" in report.problems[0]


def test_a_made_set_in_this_layout(revisited):
    (revisited / "gnd_roxford5k.pkl").rename(revisited / "gnd_made.pkl")
    report = check_set(revisited)
    assert (report.kind, report.ok) == ("revisited", True)
    assert set(verdicts(report)) == {"gnd_made.pkl", "images"}


@pytest.mark.parametrize(("record", "words", "verdict"), [
    (None, "cannot be told", "note"),
    ("oxbuild_images-v1.tgz", "blurred: these are the images of 2022 (oxbuild_images-v1.tgz)", "note"),
    ("oxbuild_images.tgz", "as in the first release (oxbuild_images.tgz)", "ok"),
])
def test_which_release_of_the_buildings(revisited, record, words, verdict):
    if record:
        files = {"gnd_roxford5k.pkl": {"file": "gnd_roxford5k.pkl"}, "oxbuild_images-v1.tgz": {"file": record}}
        (revisited / "fetched.json").write_text(json.dumps({"set": "roxford5k", "files": files}))
    found = finding(check_set(revisited), "faces")
    assert words in found.value and found.verdict == verdict


@each("content", ["", "{", "[]", '{"files": 3}', '{"files": {"a": 3}}', '{"files": {"a": {}}}',
                  "\xff"])
def test_a_damaged_record_says_nothing(revisited, content):
    (revisited / "fetched.json").write_bytes(content.encode("latin1"))
    assert "cannot be told" in finding(check_set(revisited), "faces").value


def test_damaged_images_of_paris_do_no_harm(revisited):
    for name in check_sets.PARIS_DAMAGED[:3]:
        save_empty(revisited / "jpg" / name)
    report = check_set(revisited)
    assert report.ok
    assert finding(report, "damaged images").value.startswith("3 that are damaged in the official archives too")


def test_distractors_by_their_list(tmp_path, monkeypatch):
    monkeypatch.setattr(check_sets, "DISTRACTORS", 3)
    root = tmp_path / "revisitop1m"
    for name in ("00/a b.jpg", "00/b.jpg", "01/c.jpg"):
        save_empty(root / "jpg" / name)
    (root / "revisitop1m.txt").write_text("00/a b.jpg\n00/b.jpg\n01/c.jpg\n")
    steps = []
    report = check_set(root, progress=lambda *step: steps.append(step))
    assert (report.kind, report.ok) == ("revisitop1m", True)
    assert steps == [(3, 3)]
    (root / "jpg" / "00" / "b.jpg").unlink()
    assert check_set(root).problems[0].endswith("missing: 00/b.jpg (patchssl data get revisitop1m ROOT)")
    (root / "revisitop1m.txt").write_text("00/a b.jpg\n")
    assert "1 names instead of 3" in check_set(root).problems[0]
    (root / "revisitop1m.txt").unlink()
    assert "the list of the images is not in" in check_set(root, "revisitop1m").problems[0]


# --- one's own images ---

def test_ones_own_images_are_all_decoded(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for name in ("cats", "dogs"):
            for number in range(count):
                save(tmp_path / split / name / f"{number}.jpg")
    steps = []
    report = check_set(tmp_path, progress=lambda *step: steps.append(step))
    assert (report.kind, report.ok) == ("images", True)
    assert "6 train images in 2 classes" in finding(report, "train").value
    assert steps[-1] == (10, 10) and steps == sorted(steps)
    (tmp_path / "val" / "dogs" / "1.jpg").write_bytes(b"no image")
    (tmp_path / "val" / "dogs").rename(tmp_path / "val" / "wolves")
    problems = check_set(tmp_path).problems
    assert "1 of 4 cannot be read: " in problems[0] and "wolves/1.jpg (" in problems[0]
    assert "has classes that train has not: wolves" in problems[1]


def test_images_without_splits(tmp_path):
    save(tmp_path / "a.jpg")
    assert "1 image without labels" in check_set(tmp_path).findings[0].value


# --- the report, and what cannot be checked ---

def test_the_report_reads_well_and_is_plain_json(cifar):
    (cifar / "test_batch").unlink()
    report = check_set(cifar)
    text = report.as_text()
    assert text.startswith(f"{cifar}: cifar10\n")
    assert "! test_batch" in text and text.endswith("1 problem, marked with !")
    plain = json.loads(json.dumps(report.as_dict()))
    assert plain["set"] == "cifar10" and plain["ok"] is False
    assert plain["findings"][-2]["verdict"] == "problem"


def test_what_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is no folder"):
        check_set(tmp_path / "file")
    with pytest.raises(DataError, match="there is no folder"):
        check_set(tmp_path / "absent")
    with pytest.raises(DataError, match="0 images in"):
        check_set(tmp_path)
    with pytest.raises(UsageError, match=r"set 'cifar' is unknown; did you mean 'cifar10'\?"):
        check_set(tmp_path, "cifar")


@each("name", sorted(set(CHECKS) - {"images"}))
def test_an_empty_folder_is_no_set(tmp_path, name):
    report = check_set(tmp_path, name)
    assert not report.ok
    assert all(problem.count("(") for problem in report.problems)  # with advice
