"""Indexes of archives, and what a crafted or damaged one is answered with."""

import io
import os
import stat
import struct
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from cases import each

from patchssl.data import archives as module
from patchssl.data.archives import index_archive
from patchssl.data.members import read_member
from patchssl.runtime.errors import DataError, UnreadableImage

FILES = {"./a/1.jpg": b"one" * 100, "a/2.jpg": b"two" * 500, "b/é.jpg": b"", f"b/{'long' * 60}.jpg": b"4",
         ".hidden/5.jpg": b"no", "a/._1.jpg": b"no"}


def tar_of(path: Path, files, *, format=tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def zip_of(path: Path, files, method=zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return path


def contents(path: Path) -> dict[str, bytes]:
    members = index_archive(path)
    return {name: read_member(path, place, name) for name, place in zip(members.names, members.places, strict=True)}


@each("make", [
    lambda path: tar_of(path / "x.tar", FILES),
    lambda path: tar_of(path / "x.tar", FILES, format=tarfile.GNU_FORMAT),
    lambda path: zip_of(path / "x.zip", FILES),
    lambda path: zip_of(path / "x.ZIP", FILES, zipfile.ZIP_STORED),
], ids=["pax", "gnu", "deflated", "stored"])
def test_members_are_read_in_place(make, tmp_path):
    made = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert contents(made) == {name.removeprefix("./"): content for name, content in FILES.items()
                              if "/." not in f"/{name.removeprefix('./')}"}
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written beside the archive


def test_a_zip_behind_other_bytes(tmp_path):
    """As programs that unpack themselves are: all offsets are shifted."""
    made = zip_of(tmp_path / "x.zip", {"1.jpg": b"content" * 9})
    made.write_bytes(b"#!/bin/sh\n" * 7 + made.read_bytes())
    assert contents(made) == {"1.jpg": b"content" * 9}


def zip_by(path: Path, files, system: int, flag: int = 0) -> Path:
    """A zip as another system writes it: names are bytes, stored with `flag`."""
    with zipfile.ZipFile(path, "w") as packed:
        for number, content in enumerate(files.values()):
            packed.writestr(f"{number:0{len([*files][number])}d}", content)
    whole = path.read_bytes()
    for number, name in enumerate(files):
        whole = whole.replace(f"{number:0{len(name)}d}".encode(), name)
    for mark, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        parts = whole.split(mark)
        whole = mark.join([parts[0], *(part[: at - 4] + struct.pack("<H", flag) + part[at - 2:] for part in parts[1:])])
    parts = whole.split(b"PK\1\2")
    path.write_bytes(b"PK\1\2".join([parts[0], *(part[:1] + bytes([system]) + part[2:] for part in parts[1:])]))
    return path


@each("system", [0, 10, 14])
def test_a_zip_made_on_windows(system, tmp_path):
    files = {b"train\\cat\\1.jpg": b"one" * 9, b"train\\dog\\": b"", b"train\\dog\\2.jpg": b"two",
             b"val/cat\\\x813.jpg": b"three"}
    path = zip_by(tmp_path / "x.zip", files, system)
    assert contents(path) == {"train/cat/1.jpg": b"one" * 9, "train/dog/2.jpg": b"two", "val/cat/ü3.jpg": b"three"}


@each("name", [b"C:\\x\\1.jpg", b"..\\1.jpg", b"a\\..\\..\\1.jpg", b"\\1.jpg", b"\\\\host\\1.jpg"])
def test_names_of_windows_that_lead_out_are_refused(name, tmp_path):
    with pytest.raises(DataError, match="leads out of the archive"):
        index_archive(zip_by(tmp_path / "x.zip", {name: b"x"}, 0))


def test_two_names_that_become_one(tmp_path):
    with pytest.raises(DataError, match=r"two files called a/1\.jpg"):
        index_archive(zip_by(tmp_path / "x.zip", {b"a\\1.jpg": b"x", b"a/1.jpg": b"y"}, 0))


def test_names_of_unix_are_bytes(tmp_path):
    """As of macOS, which writes UTF-8 and does not say so; what is no UTF-8 is called as where it is unpacked."""
    files = {"a/é.jpg".encode(): b"one", b"a/\xe9.jpg": b"two"}
    assert contents(zip_by(tmp_path / "x.zip", files, 3)) == {"a/é.jpg": b"one", "a/\udce9.jpg": b"two"}
    assert contents(zip_by(tmp_path / "y.zip", {"a/é.jpg".encode(): b"1"}, 3, 0x800)) == {"a/é.jpg": b"1"}


@each("name", ["/etc/1.jpg", "../1.jpg", "a/../../1.jpg", "a\\1.jpg"])
@each("make", [tar_of, zip_of])
def test_names_that_lead_elsewhere(make, name, tmp_path):
    made = make(tmp_path / ("x.tar" if make is tar_of else "x.zip"), {"0.jpg": b"0", name: b"1"})
    with pytest.raises(DataError, match=r"the archive .*/x\.\w+ is refused: '.*1\.jpg' leads out of the archive"):
        index_archive(made)


@pytest.mark.parametrize("make", [tar_of, zip_of])
def test_two_members_of_one_name(make, tmp_path):
    made = make(tmp_path / ("x.tar" if make is tar_of else "x.zip"), {"a/1.jpg": b"0", "./a/1.jpg": b"1"})
    with pytest.raises(DataError, match=r"is refused: it holds two files called a/1\.jpg"):
        index_archive(made)


@each(("kind", "what"), [
    (tarfile.SYMTYPE, "a link"), (tarfile.LNKTYPE, "a link"), (tarfile.FIFOTYPE, "neither a file nor a folder"),
    (tarfile.CHRTYPE, "neither a file nor a folder")])
def test_links_and_devices_in_a_tar(kind, what, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("1.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(DataError, match=rf"'1\.jpg' is {what}; only plain files are read"):
        index_archive(tmp_path / "x.tar")


def test_links_in_a_zip(tmp_path):
    info = zipfile.ZipInfo("1.jpg")
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        packed.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match=r"'1\.jpg' is a link"):
        index_archive(tmp_path / "x.zip")


def test_encrypted_members(tmp_path):
    made = zip_of(tmp_path / "x.zip", {"1.jpg": b"secret"})
    data = bytearray(made.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1  # the flag in the directory
    made.write_bytes(data)
    with pytest.raises(DataError, match=r"'1\.jpg' is encrypted"):
        index_archive(made)


def test_other_ways_of_packing(tmp_path):
    made = zip_of(tmp_path / "x.zip", {"1.jpg": b"1" * 100}, zipfile.ZIP_LZMA)
    with pytest.raises(DataError, match=r"'1\.jpg' is packed by method 14; only stored and deflated"):
        index_archive(made)


def test_members_that_claim_to_be_huge(tmp_path):
    made = zip_of(tmp_path / "x.zip", {"1.jpg": bytes(1000)})
    data = bytearray(made.read_bytes())
    struct.pack_into("<L", data, data.index(b"PK\1\2") + 24, 2**31)  # its unpacked size in the directory
    made.write_bytes(data)
    with pytest.raises(DataError, match=r"'1\.jpg' claims 2,147,483,648 bytes, more than the 268,435,456"):
        index_archive(made)
    made = tar_of(tmp_path / "x.tar", {"1.jpg": bytes(1000)})
    with made.open("r+b") as file:
        info = tarfile.TarInfo("1.jpg")
        info.size = 2**40
        file.write(info.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(DataError, match=r"it ends within '1\.jpg'|ends early|unexpected end of data|claims"):
        index_archive(made)


def test_a_member_that_unpacks_to_more_than_it_claims(tmp_path, monkeypatch):
    """The bomb itself: no more is unpacked than was claimed."""
    made = zip_of(tmp_path / "x.zip", {"1.jpg": bytes(10**6), "2.jpg": b"2"})
    members = index_archive(made)
    place = members.places[0].copy()
    place["size"] = 1000
    with pytest.raises(UnreadableImage, match=r"it does not unpack to the 1,000 bytes that the archive claims"):
        read_member(made, place, "1.jpg")


def test_a_long_header_is_not_read_into_memory(tmp_path):
    info = tarfile.TarInfo("1.jpg")
    info.type, info.size = tarfile.XHDTYPE, 2**30
    (tmp_path / "x.tar").write_bytes(info.tobuf() + bytes(2000))
    with pytest.raises(DataError, match=r"it holds a header of 1,073,741,824 bytes"):
        index_archive(tmp_path / "x.tar")


@each("keep", [0, 100, 512, 700, 1024, 1100, 1536, 2048, 2600])
def test_a_tar_that_ends_early(keep, tmp_path):
    """Cut within a header, within a member, or at a border between two, which looks like an end."""
    made = tar_of(tmp_path / "x.tar", {f"{i}.jpg": bytes([65 + i]) * 600 for i in range(2)}, format=tarfile.GNU_FORMAT)
    assert len(contents(made)) == 2
    made.write_bytes(made.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"x\.tar is (refused: (it ends within|no end mark)|damaged)"):
        index_archive(made)


def test_a_tar_with_a_damaged_header_does_not_end_there(tmp_path):
    made = tar_of(tmp_path / "x.tar", {f"{i}.jpg": b"x" * 600 for i in range(3)}, format=tarfile.GNU_FORMAT)
    data = bytearray(made.read_bytes())
    data[1536 + 150] ^= 1  # in the checksum of the second header
    made.write_bytes(data)
    with pytest.raises(DataError, match="no end mark lies after 1,536 of its"):
        index_archive(made)


def test_joined_tars_are_not_read_in_part(tmp_path):
    parts = [tar_of(tmp_path / f"{i}.tar", {f"{i}.jpg": b"x"}).read_bytes() for i in range(2)]
    (tmp_path / "x.tar").write_bytes(b"".join(parts))
    with pytest.raises(DataError, match="or several were joined"):
        index_archive(tmp_path / "x.tar")


@each("share", [0.0, 0.3, 0.9, 0.99])
def test_a_zip_that_ends_early(share, tmp_path):
    made = zip_of(tmp_path / "x.zip", {f"{i}.jpg": os.urandom(100) for i in range(9)})
    made.write_bytes(made.read_bytes()[:int(share * made.stat().st_size)])
    with pytest.raises(DataError, match=r"x\.zip is damaged: File is not a zip file"):
        index_archive(made)


@each("name", ["x.tar.gz", "x.tgz", "x.tar"])
def test_what_is_compressed_as_a_whole_is_refused(name, tmp_path):
    with tarfile.open(tmp_path / name, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("1.jpg"), io.BytesIO())
    with pytest.raises(DataError, match=r"compressed as a whole, .* unpack it once to a plain \.tar: gunzip --keep"):
        index_archive(tmp_path / name)


def test_content_that_changed_after_the_index(tmp_path):
    made = zip_of(tmp_path / "x.zip", {"1.jpg": b"content" * 50}, zipfile.ZIP_STORED)
    place = index_archive(made).places[0]
    data = bytearray(made.read_bytes())
    data[60] ^= 255
    made.write_bytes(data)
    with pytest.raises(UnreadableImage, match=r"1\.jpg cannot be read as an image: .*its checksum is wrong"):
        read_member(made, place, "1.jpg")
    made.write_bytes(b"")
    with pytest.raises(UnreadableImage, match="it ends early"):
        read_member(made, place, "1.jpg")
    made.unlink()
    with pytest.raises(UnreadableImage, match="No such file"):
        read_member(made, place, "1.jpg")


def test_a_large_index_is_kept_until_the_archive_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("PATCHSSL_CACHE", str(tmp_path / "cache"))
    made = tar_of(tmp_path / "x.tar", {"1.jpg": b"1", "1.cls": b"7\n"})
    index_archive(made)
    assert not (tmp_path / "cache").exists()
    first = index_archive(made, keep_from=1)
    [kept] = (tmp_path / "cache/archives").iterdir()
    monkeypatch.setattr(module, "_scan", None)  # would fail if it were asked
    again = index_archive(made)
    assert (list(again.names), list(again.labels)) == (["1.jpg", "1.cls"], ["", "7"])
    np.testing.assert_array_equal(again.places, first.places)
    monkeypatch.undo()
    monkeypatch.setenv("PATCHSSL_CACHE", str(tmp_path / "cache"))
    tar_of(made, {"1.jpg": b"1", "1.cls": b"7\n", "2.jpg": b"2"})
    assert len(index_archive(made, keep_from=1).names) == 3
    for damage in (b"", b"no index", kept.read_bytes()[:300]):
        kept.write_bytes(damage)
        assert len(index_archive(made).names) == 3


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path, monkeypatch):
    (tmp_path / "cache").touch()
    monkeypatch.setenv("PATCHSSL_CACHE", str(tmp_path / "cache"))
    assert len(index_archive(tar_of(tmp_path / "x.tar", {"1.jpg": b"1"}), keep_from=1).names) == 1


@pytest.mark.parametrize("make", [tar_of, zip_of])
def test_labels_are_read_with_the_index(make, tmp_path):
    made = make(tmp_path / ("x.tar" if make is tar_of else "x.zip"), {"1.jpg": b"1", "1.cls": b" 7\n", "2.jpg": b"2"})
    assert list(index_archive(made).labels) == ["", "7", ""]


def test_labels_are_short_text(tmp_path):
    with pytest.raises(DataError, match=r"'1\.cls' is no label: it has more than 256 bytes"):
        index_archive(tar_of(tmp_path / "x.tar", {"1.cls": b"1" * 300}))
    with pytest.raises(DataError, match=r"'1\.cls' is no label: it has more than 256 bytes"):
        index_archive(zip_of(tmp_path / "x.zip", {"1.cls": bytes(10**7)}))
    with pytest.raises(DataError, match=r"'1\.cls' is no label: it begins with b'\\xff"):
        index_archive(tar_of(tmp_path / "y.tar", {"1.cls": b"\xff\xfe\0"}))


@pytest.mark.parametrize("make", [tar_of, zip_of])
def test_any_flipped_byte_is_an_error_or_does_no_harm(make, tmp_path):
    """Never another exception, whatever byte of the headers is damaged."""
    whole = make(tmp_path / "whole", {"a/1.jpg": b"content" * 9, "b/2.jpg": b"2" * 700}).read_bytes()
    made = tmp_path / ("x.tar" if make is tar_of else "x.zip")
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(300):
            data = bytearray(whole)
            data[rng.integers(min(len(data), 3000))] ^= 1 << int(rng.integers(8))
            made.write_bytes(data)
            try:
                contents(made)
            except DataError:
                continue
