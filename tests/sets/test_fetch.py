import gzip
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import re
import signal
import struct
import tarfile
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torchvision.datasets
from cases import each

from patchssl.data.open import open_pair
from patchssl.runtime.errors import DataError, FolderInUse, UsageError
from patchssl.sets import check as check_sets
from patchssl.sets import download
from patchssl.sets import fetch as fetch_sets
from patchssl.sets import imagenet as check_imagenet
from patchssl.sets.check import CHECKS, check_set
from patchssl.sets.copydays import open_copydays
from patchssl.sets.fetch import SETS, FetchableSet, RemoteFile, get_set
from patchssl.sets.revisited import find_ground_truth

# --- the sets as data ---

def test_the_sets_are_those_of_the_command():
    assert list(SETS) == ["cifar10", "fashion-mnist", "imagenette", "copydays", "roxford5k", "rparis6k", "revisitop1m"]
    assert set(SETS) <= set(CHECKS)


FILES = [(entry.name, file) for entry in SETS.values() for file in entry.files]


def test_files_are_complete_and_addresses_lead_to_them():
    assert {len(entry.files) for entry in SETS.values()} == {1, 4, 2, 3, 101}
    for name, file in FILES:
        assert file.urls, name
        for url in file.urls:
            assert urlsplit(url).scheme in ("http", "https")
            assert url.endswith("/" + file.name)
        assert file.md5 is None or re.fullmatch("[0-9a-f]{32}", file.md5)
        assert file.recorded is None or re.fullmatch("[0-9a-f]{64}", file.recorded)
        assert (file.most_bytes is not None) == file.name.endswith((".tar.gz", ".tgz"))
        assert not Path(file.folder).is_absolute() and ".." not in Path(file.folder).parts
    for entry in SETS.values():
        assert len({file.name for file in entry.files}) == len(entry.files)


def test_addresses_and_checksums_are_torchvisions():
    cifar, official = SETS["cifar10"].files[0], torchvision.datasets.CIFAR10
    assert (cifar.urls[0], cifar.name, cifar.md5) == (official.url, official.filename, official.tgz_md5)
    fashion, official = SETS["fashion-mnist"].files, torchvision.datasets.FashionMNIST
    assert [(file.name, file.md5) for file in fashion] == official.resources
    assert all(official.mirrors[0] + file.name in file.urls for file in fashion)
    small = SETS["imagenette"].files[0]
    assert (small.urls[0], small.md5) == torchvision.datasets.Imagenette._ARCHIVES["160px"]


def test_addresses_are_those_of_the_official_code():
    """revisitop's python/download.py, by its folders and file names."""
    first = {file.name: file.urls for _, file in FILES}
    vgg = "https://www.robots.ox.ac.uk/~vgg/data"
    assert first["oxbuild_images-v1.tgz"][0] == f"{vgg}/oxbuildings/oxbuild_images-v1.tgz"
    assert first["paris_2-v1.tgz"][0] == f"{vgg}/parisbuildings/paris_2-v1.tgz"
    assert "http://cmp.felk.cvut.cz/revisitop/data/datasets/rparis6k/gnd_rparis6k.pkl" in first["gnd_rparis6k.pkl"]
    distractors = "http://ptak.felk.cvut.cz/revisitop/revisitop1m"
    assert first["revisitop1m.txt"] == (f"{distractors}/revisitop1m.txt",)
    assert first["revisitop1m.100.tar.gz"] == (f"{distractors}/jpg/revisitop1m.100.tar.gz",)


# --- a site with small sets ---

class Handler(SimpleHTTPRequestHandler):
    asked: list[str]

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_):
        pass


def tar_gz(files):
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return gzip.compress(raw.getvalue(), 1, mtime=0)


@pytest.fixture
def web(tmp_path):
    """A folder that is served, the address it has, and what was asked for."""
    folder = tmp_path / "web"
    folder.mkdir()
    asked = []
    handler = partial(type("Noting", (Handler,), {"asked": asked}), directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
    thread.join()


def md5(content):
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def cifar(web, monkeypatch):
    """cifar10 with seven small files."""
    folder, address, _ = web
    content = {name: name.encode() for name in check_sets.CIFAR10_MD5}
    archive = tar_gz({f"cifar-10-batches-py/{name}": data for name, data in content.items()})
    (folder / "cifar.tar.gz").write_bytes(archive)
    monkeypatch.setattr(check_sets, "CIFAR10_MD5", {name: md5(data) for name, data in content.items()})
    file = RemoteFile(name="cifar.tar.gz", urls=(f"{address}/cifar.tar.gz",), md5=md5(archive), most_bytes=10**6)
    entry = FetchableSet(name="cifar10", size="1 kB", page="https://example.org/cifar", files=(file,))
    monkeypatch.setattr(fetch_sets, "SETS", {"cifar10": entry})
    return entry


BLOCKS = {"jpeg": (3, 5, 8, 10, 15, 20, 30, 50, 75), "crop": (10, 15, 20, 30, 40, 50, 60, 70, 80)}


@pytest.fixture
def copydays(web, monkeypatch):
    """Two originals in archives laid out as INRIA's; the real description with other addresses."""
    folder, address, _ = web
    originals = {"300000.jpg": b"a", "300100.jpg": b"b"}
    archives = {
        "original": originals, "strong": {"300001.jpg": b"c"},
        "jpeg": {f"jpegqual/{q}/{name}": data for q in BLOCKS["jpeg"] for name, data in originals.items()},
        "crop": {f"some/crops/{p}/{name}": data for p in BLOCKS["crop"] for name, data in originals.items()}}
    for part, files in archives.items():
        (folder / f"copydays_{part}.tar.gz").write_bytes(tar_gz(files))
    monkeypatch.setattr(fetch_sets, "_INRIA", (f"{address}/gone/", f"{address}/"))
    files = tuple(fetch_sets._copydays(*arguments) for arguments in (
        ("original", "original", 1), ("strong", "strong", 1), ("jpeg", "jpegqual", 2), ("crop", "crops", 2)))
    entry = FetchableSet(name="copydays", size="1 kB", page="https://example.org/copydays", files=files, note="A note.")
    monkeypatch.setattr(fetch_sets, "SETS", {"copydays": entry})
    return entry


def names_below(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def test_a_set_is_fetched_unpacked_checked_and_named(cifar, tmp_path, web):
    said, steps = [], []
    place = get_set("cifar10", tmp_path / "root", say=said.append, progress=lambda *step: steps.append(step))
    assert place == tmp_path / "root" / "cifar10"
    assert names_below(tmp_path / "root") == sorted(
        ["cifar10/fetched.json", *(f"cifar10/cifar-10-batches-py/{name}" for name in check_sets.CIFAR10_MD5)])
    assert check_set(place).ok
    archive = (web[0] / "cifar.tar.gz").read_bytes()
    assert json.loads((place / "fetched.json").read_text()) == {"set": "cifar10", "files": {"cifar.tar.gz": {
        "file": "cifar.tar.gz", "bytes": len(archive), "sha256": hashlib.sha256(archive).hexdigest()}}}
    assert [step for step in steps if step[1] == step[2]] == [
        ("fetching cifar.tar.gz (MB)", 1, 1), ("unpacking cifar.tar.gz (MB)", 1, 1), ("checking cifar10", 7, 7)]
    assert get_set("cifar10", tmp_path / "root", say=said.append) == place
    assert said == [f"{place} is there and complete: nothing is fetched"]
    assert web[2] == ["/cifar.tar.gz"]


def test_files_that_are_no_archives_go_where_the_reader_looks(web, tmp_path, monkeypatch):
    folder, address, _ = web
    files = []
    for split, count in (("train", 60_000), ("t10k", 10_000)):
        for kind, array in (("images-idx3", np.zeros((count, 28, 28), np.uint8)),
                            ("labels-idx1", (np.arange(count) % 10).astype(np.uint8))):
            path = folder / f"{split}-{kind}-ubyte.gz"
            header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            path.write_bytes(gzip.compress(header + array.tobytes(), 1))
            files.append(RemoteFile(name=path.name, urls=(f"{address}/{path.name}",), md5=md5(path.read_bytes()),
                                    folder=SETS["fashion-mnist"].files[0].folder))
    monkeypatch.setattr(check_sets, "FASHION_MD5", {file.name: file.md5 for file in files})
    monkeypatch.setattr(fetch_sets, "SETS", {"fashion-mnist": FetchableSet(
        name="fashion-mnist", size="", page="", files=tuple(files))})
    place = get_set("fashion-mnist", tmp_path / "root")
    train, val = open_pair(place)
    assert (len(train), len(val), train.name) == (60_000, 10_000, "FashionMNIST")


def test_archives_are_kept_where_asked_for(cifar, tmp_path, web):
    get_set("cifar10", tmp_path, keep_archives=True)
    kept = tmp_path / "cifar10.archives" / "cifar.tar.gz"
    assert kept.read_bytes() == (web[0] / "cifar.tar.gz").read_bytes()
    (tmp_path / "cifar10").rename(tmp_path / "old")
    get_set("cifar10", tmp_path)  # from the one that was kept
    assert web[2] == ["/cifar.tar.gz"]
    assert not kept.parent.exists()


def test_a_mirror_is_asked_first(cifar, tmp_path, web):
    folder, address, asked = web
    (folder / "mine").mkdir()
    (folder / "cifar.tar.gz").rename(folder / "mine" / "cifar.tar.gz")
    get_set("cifar10", tmp_path / "a", mirror=f"{address}/mine/")
    get_set("cifar10", tmp_path / "b", mirror=f"{address}/mine")
    assert asked == ["/mine/cifar.tar.gz"] * 2
    with pytest.raises(UsageError, match="the mirror 'mine' is no address"):
        get_set("cifar10", tmp_path / "c", mirror="mine")


@pytest.mark.parametrize("given", ["folder", "file", "list"])
def test_without_a_network_from_archives(cifar, tmp_path, web, given):
    folder, _, asked = web
    archives = {"folder": folder, "file": folder / "cifar.tar.gz", "list": [folder / "cifar.tar.gz"]}[given]
    assert check_set(get_set("cifar10", tmp_path / "root", archives=archives)).ok
    assert asked == []
    assert (folder / "cifar.tar.gz").exists()  # it is not ours to remove
    assert not (tmp_path / "root" / "cifar10.archives").exists()


def test_a_wrong_archive_is_refused_before_it_is_unpacked(cifar, tmp_path, web):
    path = web[0] / "cifar.tar.gz"
    path.write_bytes(tar_gz({"cifar-10-batches-py/data_batch_1": b"other"}))
    with pytest.raises(DataError, match=f"{path} is not cifar.tar.gz as it was published: its md5 is"):
        get_set("cifar10", tmp_path / "root", archives=path)
    with pytest.raises(DataError, match=r"could not be fetched:\n .*its md5 is"):
        get_set("cifar10", tmp_path / "root")
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["cifar10.archives"]
    assert names_below(tmp_path / "root") == []


def test_missing_archives_are_named_with_their_addresses(copydays, tmp_path, web):
    (web[0] / "copydays_crop.tar.gz").unlink()
    with pytest.raises(DataError) as error:
        get_set("copydays", tmp_path / "root", archives=web[0])
    assert f"1 of the 4 files of copydays are not in {web[0]}:\n  copydays_crop.tar.gz, from http" in str(error.value)
    assert names_below(tmp_path / "root") == []
    with pytest.raises(DataError, match="there is no file or folder"):
        get_set("copydays", tmp_path / "root", archives=tmp_path / "absent")
    assert web[2] == []


def test_copydays_gets_the_layout_the_reader_wants(copydays, tmp_path, web):
    said = []
    place = get_set("copydays", tmp_path / "root", say=said.append)
    found = open_copydays(place, needs_distractors=False, needs_whitening=False)
    assert [len(block.images) for block in found.blocks] == [2, 1] + [2] * 18
    assert said == ["copydays (1 kB): A note."]
    assert web[2][:2] == ["/gone/copydays_original.tar.gz", "/copydays_original.tar.gz"]  # in turn


def test_what_can_be_had_is_had_and_the_rest_is_named(copydays, tmp_path, web):
    folder, address, asked = web
    held_back = (folder / "copydays_jpeg.tar.gz").read_bytes()
    (folder / "copydays_jpeg.tar.gz").unlink()
    root = tmp_path / "root"
    with pytest.raises(DataError) as error:
        get_set("copydays", root)
    text = str(error.value)
    assert f"copydays_jpeg.tar.gz could not be fetched:\n  {address}/gone/copydays_jpeg.tar.gz: HTTP 404" in text
    assert f"save it as {root / 'copydays.archives' / 'copydays_jpeg.tar.gz'}" in text
    assert "copydays is described at https://example.org/copydays" in text
    assert not (root / "copydays").exists()
    asked.clear()
    (root / "copydays.archives" / "copydays_jpeg.tar.gz").write_bytes(held_back)  # as the message says
    assert check_set(get_set("copydays", root)).ok
    assert asked == []
    assert [path.name for path in root.iterdir()] == ["copydays"]


def test_the_rest_can_come_from_archives(copydays, tmp_path, web):
    folder, _, asked = web
    crop = folder / "copydays_crop.tar.gz"
    crop.rename(tmp_path / "copydays_crop.tar.gz")
    with pytest.raises(DataError):
        get_set("copydays", tmp_path / "root")
    asked.clear()
    get_set("copydays", tmp_path / "root", archives=tmp_path / "copydays_crop.tar.gz")
    assert asked == []


def test_after_three_failures_the_rest_is_not_tried(copydays, tmp_path, web):
    for path in web[0].iterdir():
        path.unlink()
    with pytest.raises(DataError) as error:
        get_set("copydays", tmp_path / "root")
    assert str(error.value).count("could not be fetched") == 3
    assert len(web[2]) == 6


def test_an_incomplete_set_gets_no_name(copydays, tmp_path, web):
    (web[0] / "copydays_crop.tar.gz").write_bytes(tar_gz({"crops/10/300000.jpg": b"a"}))
    root = tmp_path / "root"
    with pytest.raises(DataError, match=r"copydays.partial is not the complete set copydays:\n  blocks: .*crops/15"):
        get_set("copydays", root)
    assert not (root / "copydays").exists()
    (root / "copydays").mkdir()
    with pytest.raises(DataError, match=r"copydays is not the complete set copydays:\n.*\nMove it away"):
        get_set("copydays", root)


def test_a_file_unlike_the_recorded_one_is_told_of_but_taken(copydays, tmp_path, web, monkeypatch):
    original = fetch_sets._copydays("original", "original", 1, recorded="0" * 64)
    entry = FetchableSet(name="copydays", size="", page="", files=(original, *copydays.files[1:]))
    monkeypatch.setattr(fetch_sets, "SETS", {"copydays": entry})
    said = []
    get_set("copydays", tmp_path / "root", say=said.append)
    assert len(said) == 1
    assert "copydays_original.tar.gz is not the file that others have got: its sha256 is" in said[0]


def test_hostile_archives_reach_nothing(copydays, tmp_path, web):
    (web[0] / "copydays_strong.tar.gz").write_bytes(tar_gz({"../../../evil.jpg": b"x"}))
    with pytest.raises(DataError, match="leads out of the folder"):
        get_set("copydays", tmp_path / "root")
    assert not list(tmp_path.rglob("evil*"))


def small_imagenette():
    """imagenette2-160.tgz with two images of a class to train on and one to score."""
    images = {f"imagenette2-160/{split}/{name}/{name}_{number}.JPEG": b"image"
              for name in check_imagenet.IMAGENETTE_CLASSES for split, numbers in (("train", (1, 2)), ("val", (3,)))
              for number in numbers}
    return {"imagenette2-160/noisy_imagenette.csv": b"path,noisy_labels_0", "imagenette2-160/.DS_Store": b"", **images}


@pytest.fixture
def imagenette(web, monkeypatch):
    """The real description of the set with another address, checksum and size."""
    def serve(files):
        archive = tar_gz(files)
        (web[0] / "imagenette2-160.tgz").write_bytes(archive)
        file = replace(official.files[0], urls=(f"{web[1]}/imagenette2-160.tgz",), md5=md5(archive))
        monkeypatch.setattr(fetch_sets, "SETS", {"imagenette": replace(official, files=(file,))})

    official = SETS["imagenette"]
    monkeypatch.setattr(check_imagenet, "IMAGENETTE", {"train": 20, "val": 10})
    serve(small_imagenette())
    return serve


def test_imagenette_is_a_root_with_train_and_val(imagenette, tmp_path):
    place = get_set("imagenette", tmp_path / "root")
    train, val = open_pair(place)
    assert (len(train), len(val), train.name) == (20, 10, "imagenette")
    assert set(train.classes) == check_imagenet.IMAGENETTE_CLASSES == set(val.classes)
    said = []
    assert get_set("imagenette", tmp_path / "root", say=said.append) == place  # a folder that is there is left alone
    assert said == [f"{place} is there and complete: nothing is fetched"]


def test_an_imagenette_that_lacks_images_gets_no_name(imagenette, tmp_path):
    imagenette({name: data for name, data in small_imagenette().items() if "n03888257_3" not in name})
    with pytest.raises(DataError, match="val: 9 images in 9 classes instead of 10 in the ten of Imagenette"):
        get_set("imagenette", tmp_path / "root")
    assert not (tmp_path / "root" / "imagenette").exists()


def test_a_broken_or_other_archive_of_imagenette_is_refused(imagenette, tmp_path, web):
    path = web[0] / "imagenette2-160.tgz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(DataError, match=f"{path} is not imagenette2-160.tgz as it was published: its md5 is"):
        get_set("imagenette", tmp_path / "root", archives=path)
    with pytest.raises(DataError, match=r"imagenette2-160.tgz could not be fetched:\n .*its md5 is"):
        get_set("imagenette", tmp_path / "root")
    file = replace(fetch_sets.SETS["imagenette"].files[0], md5=md5(whole[:-20]))  # as if it had been published so
    fetch_sets.SETS["imagenette"] = replace(fetch_sets.SETS["imagenette"], files=(file,))
    with pytest.raises(DataError, match="is damaged"):
        get_set("imagenette", tmp_path / "root", archives=path)
    assert names_below(tmp_path / "root") == []


def test_an_imagenette_that_is_there_and_incomplete_is_not_overwritten(imagenette, tmp_path, web):
    (tmp_path / "imagenette" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="imagenette is not the complete set imagenette:\n"):
        get_set("imagenette", tmp_path)
    assert web[2] == []


@pytest.fixture
def oxford(web, monkeypatch):
    folder, address, _ = web
    entry = {"bbx": [0.0, 0.0, 5.0, 5.0], "easy": [0], "hard": [], "junk": []}
    truth = pickle.dumps({"imlist": ["a"], "qimlist": ["q"], "gnd": [entry]})
    (folder / "gnd_roxford5k.pkl").write_bytes(truth)
    (folder / "oxbuild_images-v1.tgz").write_bytes(tar_gz({"jpg/a.jpg": b"1", "q.jpg": b"2", "README": b"3"}))
    monkeypatch.setattr(check_sets, "REVISITED", {"roxford5k": (1, 1, hashlib.sha256(truth).hexdigest())})
    monkeypatch.setattr(fetch_sets, "_REVISITED", (f"{address}/absent/", f"{address}/"))
    images = RemoteFile(name="oxbuild_images-v1.tgz", urls=(f"{address}/oxbuild_images-v1.tgz",), folder="jpg", keep=1,
                        most_bytes=10**6, other_names=SETS["roxford5k"].files[1].other_names)
    truth_file = RemoteFile(name="gnd_roxford5k.pkl", urls=(f"{address}/gnd_roxford5k.pkl",))
    monkeypatch.setattr(fetch_sets, "SETS", {"roxford5k": FetchableSet(
        name="roxford5k", size="", page="", files=(truth_file, images))})
    return folder


def test_revisited_oxford_gets_the_layout_the_reader_wants(oxford, tmp_path):
    place = get_set("roxford5k", tmp_path / "root")
    assert names_below(place) == ["fetched.json", "gnd_roxford5k.pkl", "jpg/README", "jpg/a.jpg", "jpg/q.jpg"]
    assert find_ground_truth(tmp_path / "root", "roxford5k") == (place / "gnd_roxford5k.pkl", place / "jpg")
    faces = next(finding for finding in check_set(place).findings if finding.what == "faces")
    assert faces.value.startswith("blurred")


def test_the_first_release_is_taken_from_ones_own_archives(oxford, tmp_path):
    (oxford / "oxbuild_images-v1.tgz").rename(oxford / "oxbuild_images.tgz")
    place = get_set("roxford5k", tmp_path / "root", archives=oxford)
    faces = next(finding for finding in check_set(place).findings if finding.what == "faces")
    assert (faces.verdict, faces.value) == ("ok", "as in the first release (oxbuild_images.tgz)")


def test_a_crafted_ground_truth_is_refused_and_not_run(oxford, tmp_path):
    trace = tmp_path / "trace"
    (oxford / "gnd_roxford5k.pkl").write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % str(trace).encode())
    with pytest.raises(DataError, match=r"asks for (os|posix)\.system"):
        get_set("roxford5k", tmp_path / "root")
    assert not trace.exists()


# --- interruptions ---

def fetch_and_die(root, file_name):
    """Fetch copydays; die while `file_name` is unpacked."""
    real = fetch_sets.unpack

    def unpack(archive, folder, **options):
        if archive.name == file_name:
            (folder / "half.jpg").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(archive, folder, **options)

    fetch_sets.unpack = unpack
    get_set("copydays", root)


def test_a_run_that_was_killed_is_gone_on_with(copydays, tmp_path, web):
    root = tmp_path / "root"
    process = multiprocessing.get_context("fork").Process(target=fetch_and_die, args=(root, "copydays_crop.tar.gz"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (root / "copydays").exists()
    web[2].clear()
    place = get_set("copydays", root)
    assert web[2] == []  # the archive had come, the others were in place
    assert check_set(place).ok
    assert sorted(path.name for path in root.iterdir()) == ["copydays"]


def test_two_runs_at_once_do_not_mix(cifar, tmp_path):
    with fetch_sets._alone(tmp_path / "cifar10.partial"), \
            pytest.raises(FolderInUse, match=r"cifar10.partial is in use by process .*; wait for it to end"):
        get_set("cifar10", tmp_path)
    get_set("cifar10", tmp_path)


def test_a_folder_that_cannot_be_written_is_a_sentence(cifar, tmp_path):
    (tmp_path / "root").write_text("a file")
    with pytest.raises(DataError, match=r"cifar10.partial cannot be written"):
        get_set("cifar10", tmp_path / "root")


# --- names ---

@each(("name", "message"), [
    ("cifar", r"set 'cifar' is unknown; did you mean 'cifar10'\?"),
    ("imagenet100", "patchssl data imagenet100 --from IMAGENET OUT"),
    ("imagenet", "image-net.org gives it to those who have asked for access"),
    ("ImageNet1k", "image-net.org"),
    ("imagenette2", r"did you mean 'imagenette'\?"),
    ("../evil", "is unknown"),
])
def test_other_names(tmp_path, name, message):
    with pytest.raises(UsageError, match=message):
        get_set(name, tmp_path / "root")
    assert not (tmp_path / "root").exists()


def test_megabytes_reach_the_whole_only_at_the_end(tmp_path):
    steps = []
    task = fetch_sets._Fetch(SETS["cifar10"], tmp_path, tmp_path, None, False, lambda *step: steps.append(step), print)
    tell = task._megabytes("fetching")
    for done, total in ((0, 2_500_000), (2_499_999, 2_500_000), (2_500_000, 2_500_000), (5_000_000, None)):
        tell(done, total)
    assert [step[1:] for step in steps] == [(0, 3), (2, 3), (3, 3), (5, 6)]
    assert download.ATTEMPTS > 1
