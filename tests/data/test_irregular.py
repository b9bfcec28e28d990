"""Pipes, devices and sockets in the place of files: an error at once, never a wait or a read without an end."""

import os
import socket
import subprocess
import sys

import pytest
from packing import png

from patchssl.data.open import open_images
from patchssl.runtime.errors import DataError, UnreadableImage
from patchssl.runtime.files import open_regular, read_regular

KINDS = {"pipe": "it is a pipe", "zero": "it is a device", "tty": "it is a device|No such device",
         "socket": "No such device", "link": "it is a pipe"}


def make(kind, path):
    """Something of this kind at `path`."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        os.mkfifo(path.with_name(f".{path.name}"))
        path.symlink_to(path.with_name(f".{path.name}"))
    elif kind == "socket":
        os.chdir(path.parent)  # the address of a socket is short
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(path.name)
    else:
        path.symlink_to(f"/dev/{kind}")


@pytest.fixture(autouse=True)
def _back_home(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_none_is_an_error_by_name(kind, tmp_path):
    make(kind, tmp_path / "a")
    with pytest.raises(OSError, match=KINDS[kind]) as told:
        open_regular(tmp_path / "a")
    assert str(tmp_path / "a") == str(told.value.filename)


def test_a_file_is_read_up_to_its_bound(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_regular(tmp_path / "a", 5) == b"12345"
    with pytest.raises(OSError, match="more than the 4 bytes"):
        read_regular(tmp_path / "a", 4)


@pytest.mark.parametrize("kind", KINDS)
def test_among_images_it_is_listed_and_cannot_be_read(kind, tmp_path):
    (tmp_path / "a.png").write_bytes(png(9, (20, 20)))
    make(kind, tmp_path / "b.jpg")
    images = open_images(tmp_path)
    assert len(images) == 2
    assert images.pixels(0).shape == (20, 20, 3)
    assert not images.quick_check(1)
    with pytest.raises(UnreadableImage, match=KINDS[kind]):
        images.pixels(1)
    assert images.fingerprint


@pytest.mark.parametrize("name", ["a.txt", "a.zip", "a.tar", "a.parquet", "train-images-idx3-ubyte",
                                  "train-images-idx3-ubyte.gz", "cifar-10-python.tar.gz"])
@pytest.mark.parametrize("kind", ["pipe", "zero"])
def test_as_a_set_it_is_refused(name, kind, tmp_path):
    make(kind, tmp_path / name)
    of_folder = name.startswith("train")
    place = tmp_path if of_folder else tmp_path / name
    code = ("import sys\nfrom patchssl.data.open import open_images\nfrom patchssl.runtime.errors import DataError\n"
            "try:\n    open_images(sys.argv[1])\nexcept DataError as error:\n    print(error)\n")
    done = subprocess.run([sys.executable, "-c", code, str(place)], capture_output=True, text=True, timeout=60,
                          check=True)
    assert ("pipe" if kind == "pipe" else "device") in done.stdout
    assert str(tmp_path / name) in done.stdout


def test_a_list_that_is_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("patchssl.data.lists._LARGEST_BYTES", 10)
    (tmp_path / "a.txt").write_text("a.png\n" * 9)
    with pytest.raises(DataError, match="more than the 10 bytes"):
        open_images(tmp_path / "a.txt")
