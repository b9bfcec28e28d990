"""Small files that would unpack to far more: refused early, in little memory and time."""

import gzip
import io
import json
import random
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib

import pytest
import torch

from patchssl.data.archives import index_archive
from patchssl.eval.cache import FeatureCache

_MEASURED = """
import resource, sys
from patchssl.data.open import open_images
from patchssl.runtime.errors import DataError
import patchssl.data.packed, patchssl.data.arrays
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
try:
    images = open_images(sys.argv[1])
    for index in range(min(3, len(images))):
        images.pixels(index)
    print("read")
except DataError as error:
    print(error)
print(round(peak() - before))
"""


def opened(place):
    """What an error says of the set at `place`, or "read"; within 1 GiB of memory and 30 s."""
    done = subprocess.run([sys.executable, "-c", _MEASURED, str(place)], capture_output=True, text=True, timeout=30,
                          check=False)
    assert done.returncode == 0, done.stderr
    *said, megabytes = done.stdout.splitlines()
    assert int(megabytes) < 1024
    return "\n".join(said)


def gzipped(path, start, zeros):
    """A .gz of `start` and so many zero bytes, made from one packed block that is repeated."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    head = packer.compress(start) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(2**24)) + packer.flush(zlib.Z_FULL_FLUSH)
    with path.open("wb") as file:
        file.write(b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + head)
        for _ in range(zeros // 2**24):
            file.write(block)


@pytest.mark.parametrize("promised", [9_900_000_000, 784])
def test_an_idx_file_that_unpacks_to_ten_gigabytes(promised, tmp_path):
    gzipped(tmp_path / "train-images-idx3-ubyte.gz", b"\0\0\x08\3" + struct.pack(">III", promised // 784, 28, 28),
            9_900_000_000)
    assert "is damaged: it promises" in opened(tmp_path)


def test_an_idx_file_of_more_than_it_holds_or_of_very_many_sizes(tmp_path):
    for start in (b"\0\0\x08\3" + struct.pack(">III", 2**32 - 1, 2**32 - 1, 2**32 - 1), b"\0\0\x08\xff" + bytes(1020)):
        (tmp_path / "train-images-idx3-ubyte").write_bytes(start + bytes(100))
        assert "is damaged: it promises" in opened(tmp_path)


def member(name, size, kind=tarfile.REGTYPE):
    """The header of a member that claims so many bytes."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.type = size, kind
    return entry.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(("start", "said"), [
    (member("cifar-10-batches-py/data_batch_1", 60 * 10**9), "not CIFAR's"),
    (member("cifar-10-batches-py/other", 60 * 10**9), "holds more than"),
    (member("cifar-10-batches-py/x", 8 * 10**9, tarfile.XHDTYPE), "it holds a header of 8,000,000,000 bytes"),
    (member("cifar-10-batches-py/x", 8 * 10**9, tarfile.GNUTYPE_LONGNAME), "it holds a header"),
    (member("cifar-10-batches-py/x", 512, tarfile.GNUTYPE_SPARSE), "sparse"),
], ids=["batch", "other", "pax", "long name", "sparse"])
def test_a_cifar_archive_that_unpacks_without_an_end(start, said, tmp_path):
    gzipped(tmp_path / "cifar-10-python.tar.gz", start, 8 * 10**9)
    found = opened(tmp_path / "cifar-10-python.tar.gz")
    assert said in found
    assert str(tmp_path / "cifar-10-python.tar.gz") in found


def test_a_sparse_member_of_the_newer_kind(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        entry = tarfile.TarInfo("a.png")
        entry.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(10**12),
                             "GNU.sparse.name": "a.png"}
        content = (b"1000000000\n" + b"1\n" * 2000).ljust(4096, b"\0")
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    assert "sparse" in opened(tmp_path / "a.tar")


@pytest.mark.parametrize("claimed", [10, 2**28, 2**31])
def test_a_zip_member_that_unpacks_to_another_size(claimed, tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed, packed.open("a.png", "w") as file:
        for _ in range(64):
            file.write(bytes(2**24))
    content = path.read_bytes()
    path.write_bytes(content.replace(struct.pack("<I", 2**30), struct.pack("<I", claimed)))
    assert ("claims" if claimed > 2**28 else "does not unpack to") in opened(path)


def test_zeros_alone(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(gzip.compress(bytes(2**30)))
    assert f"the archive {tmp_path / 'cifar-10-python.tar.gz'} is refused" in opened(
        tmp_path / "cifar-10-python.tar.gz")


def test_a_kept_index_that_was_changed_anywhere_is_made_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PATCHSSL_CACHE", str(tmp_path / "cache"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        for number in range(20):
            packed.writestr(f"{number}.png", b"x" * number)
    right = index_archive(tmp_path / "a.zip", keep_from=1)
    (kept,) = (tmp_path / "cache/archives").iterdir()
    whole, chance = kept.read_bytes(), random.Random(0)
    wide = b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999,), }"
    changed = [whole[:chance.randrange(len(whole))] for _ in range(40)]
    for _ in range(200):
        at = chance.randrange(len(whole))
        changed.append(whole[:at] + bytes([whole[at] ^ chance.randrange(1, 256)]) + whole[at + 1:])
    changed += [b"", wide, whole + b"x", re.sub(rb"'shape': \(\d+,\), }", wide[-32:], whole)]
    for content in changed:
        kept.write_bytes(content)
        caplog.clear()
        found = index_archive(tmp_path / "a.zip", keep_from=1)
        assert list(found.names) == list(right.names)
        assert (found.places == right.places).all()
        assert "is damaged (its bytes have changed) and is made again" in caplog.text
    assert index_archive(tmp_path / "a.zip", keep_from=1).names[3] == right.names[3]


def test_features_whose_facts_are_damaged_are_computed_again(tmp_path):
    cache = FeatureCache(tmp_path)
    assert cache.store({"a": 1}, torch.ones(2, 3))
    (facts,) = cache.folder.glob("*.json")
    about = json.loads(facts.read_text())
    for text in ("", "[]", "3", "[" * 100_000, json.dumps(about | {"shape": [10**30, 3]}),
                 json.dumps(about | {"shape": [10**9, 10**9]}), json.dumps(about | {"shape": {}})):
        facts.write_text(text)
        assert cache.load({"a": 1}) is None
        assert len(cache.entries()) < 2
